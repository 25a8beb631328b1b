"""The position of a token within a segment (a message or a sentence)."""

from enum import IntEnum


class SegmentTag(IntEnum):
    """The tag of one token. Tensors of tags are int8."""

    OUTSIDE = 0  # the token reads, and is never written
    INSIDE = 1  # the token belongs to a segment
    LAST = 2  # the token is the last of its segment, which is written here

"""The position of a token within a segment (a message or a sentence)."""

from enum import IntEnum


class SegmentTag(IntEnum):
    """One token's tag; a tensor of them is int8."""

    OUTSIDE = 0  # it reads, and is never written
    INSIDE = 1  # it belongs to a segment
    LAST = 2  # it is the last of its segment, which is written here

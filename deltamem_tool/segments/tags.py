"""What a token is to the segments (messages, sentences) of a conversation."""

from enum import IntEnum


class SegmentTag(IntEnum):
    """One token's tag; a tensor of them is int8."""

    OUTSIDE = 0  # it reads, and is never written
    INSIDE = 1  # it belongs to a segment
    LAST = 2  # it is the last of its segment, which is written here

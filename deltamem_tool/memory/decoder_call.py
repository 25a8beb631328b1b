"""What one run of a patched decoder has to know: filled by its `hooks`, one a thread."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from threading import local

from torch import Tensor

from deltamem_tool.memory.cache import MemoryCache
from deltamem_tool.memory.state import MemoryState


@dataclass
class DecoderCall:
    """One run of the decoder. What it started from does not change while it runs, so that a layer may run twice."""

    cache: MemoryCache
    memory: MemoryState
    read_mask: Tensor | None  # bool [B, T], None for all
    write_mask: Tensor | bool  # bool [B, T], True for all, False for none
    segment_end: Tensor | None  # bool [B, T], tokens that end a segment; None for none
    tokens: int  # T
    outer: DecoderCall | None  # the run of another decoder that this one is part of
    readings: dict[int, Tensor] = field(default_factory=dict)  # scaled, [B, T, H·R] by layer
    states: dict[int, Tensor] = field(default_factory=dict)  # [B, H, R, R] by layer
    open_segments: dict[int, Tensor] = field(default_factory=dict)  # [B, W] by layer, where there are segments
    write_gates: dict[int, Tensor] = field(default_factory=dict)  # [B, 2] by layer, as `MemoryCache` has them


# What each thread runs, as `call`, and whether its models go without their memories, as `off`. Not a context variable:
# torch.compile breaks the graph wherever one is looked at.
_THREAD = local()


def running() -> DecoderCall | None:
    return getattr(_THREAD, "call", None)


def run(call: DecoderCall | None) -> None:
    """From now on this thread runs `call`."""
    _THREAD.call = call


def is_off() -> bool:
    return getattr(_THREAD, "off", False)


@contextmanager
def without_memory() -> Iterator[None]:
    """Inside, and in this thread, patched models are their base models: nothing is read, corrected or written."""
    before, _THREAD.off = is_off(), True
    try:
        yield
    finally:
        _THREAD.off = before


@contextmanager
def again(call: DecoderCall | None) -> Iterator[None]:
    """For a layer that runs a second time, perhaps in another thread: it finds what it found in `call`, and what it
    leaves there is dropped."""
    before = running()
    run(None if call is None else replace(call, readings={}, states={}, open_segments={}, write_gates={}))
    try:
        yield
    finally:
        run(before)

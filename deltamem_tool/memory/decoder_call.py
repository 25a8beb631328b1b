"""The data of one forward pass of a decoder with a memory, which `hooks` reads and fills; one per thread."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from threading import local

import torch
from torch import Tensor

from deltamem_tool.memory.cache import MemoryCache
from deltamem_tool.memory.state import MemoryState


@dataclass
class DecoderCall:
    """One forward pass of the decoder. Its starting values do not change during it, so that a layer may run twice."""

    cache: MemoryCache
    memory: MemoryState
    read_mask: Tensor | None  # bool [B, T], None for all
    write_mask: Tensor | bool  # bool [B, T], True for all, False for none
    segment_end: Tensor | None  # bool [B, T], tokens that end a segment; None for none
    tokens: int  # T
    past: int | None  # tokens in the cache before; None while a graph is traced
    outer: DecoderCall | None  # the run of another decoder that this one is part of
    readings: dict[int, Tensor] = field(default_factory=dict)  # scaled, [B, T, H·R] by layer
    states: dict[int, Tensor] = field(default_factory=dict)  # [B, H, R, R] by layer
    open_segments: dict[int, Tensor] = field(default_factory=dict)  # [B, W] by layer, where there are segments
    write_gates: dict[int, Tensor] = field(default_factory=dict)  # [B, 2] by layer, as `MemoryCache` has them

    def move_masks(self, device: torch.device) -> None:
        """Move the masks to a layer's device if they are elsewhere: they follow the hidden states."""
        for name in ("read_mask", "write_mask", "segment_end"):
            mask = getattr(self, name)
            if isinstance(mask, Tensor) and mask.device != device:
                setattr(self, name, mask.to(device))


# What each thread runs, as `call`, and whether its models go without their memories, as `off`. Not a context variable:
# torch.compile breaks the graph wherever one is looked at.
_THREAD = local()


def current_call() -> DecoderCall | None:
    """Return the forward pass that this thread runs, or None."""
    return getattr(_THREAD, "call", None)


def set_current_call(call: DecoderCall | None) -> None:
    """Set the forward pass that this thread runs."""
    _THREAD.call = call


def is_memory_off() -> bool:
    """Return whether this thread is in `without_memory`."""
    return getattr(_THREAD, "off", False)


@contextmanager
def without_memory() -> Iterator[None]:
    """Run models without their memory, as plain base models, in this thread.

    Nothing is read from the memory, corrected, or written to it.

    Example:
        >>> import deltamem_tool as deltamem
        >>> model = deltamem.load("builtin:adapter")
        >>> with deltamem.without_memory():
        ...     logits = model(**model.dummy_inputs).logits  # of the base
    """
    before, _THREAD.off = is_memory_off(), True
    try:
        yield
    finally:
        _THREAD.off = before


@contextmanager
def repeat_call(call: DecoderCall | None) -> Iterator[None]:
    """Run a layer a second time with the inputs of `call`, perhaps in another thread. Its results are dropped."""
    before = current_call()
    set_current_call(None if call is None else replace(call, readings={}, states={}, open_segments={}, write_gates={}))
    try:
        yield
    finally:
        set_current_call(before)

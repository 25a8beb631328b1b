"""Keys and values that are written in place, and the conversations that use them.

    Buffers        keys and values of one batch, and the inputs and outputs of a decode step
    BufferLease    the use of buffers by conversations that share their columns
    BufferedPast   some columns of the buffers, and a memory

ONNX Runtime runs a graph several times before it has recorded it, so a step must give the same result when it runs
again. Keys and values may therefore be written in place, but states may not: they alternate between two slots.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray
from onnxruntime import OrtValue, RunOptions

from deltamem_tool.onnx import contract
from deltamem_tool.onnx.runtime.ortvalue import copy_tensor

if TYPE_CHECKING:
    from deltamem_tool.onnx.runtime.buffered_graph import BufferedGraph


class Buffers:
    """Keys and values of one batch, `[B, heads, N, width]` by input name, to which decode steps are bound."""

    def __init__(self, graph: BufferedGraph, batch: int, room: int) -> None:
        self.batch, self.room = batch, room
        self.lock = threading.RLock()
        self.cache = {name: graph.zeros(name, batch, room) for name in graph.cache_names}
        self.owners: list[weakref.ref[BufferedPast] | None] = [None, None]
        self._graph = graph

    # The rest is only needed for decode steps, and not for a prompt.

    @cached_property
    def slots(self) -> list[dict[str, OrtValue]]:
        """The two memories between which steps alternate: each step reads one and writes the other."""
        return [{name: self._graph.zeros(name, self.batch) for name in self._graph.memory_names} for _ in range(2)]

    @cached_property
    def inputs(self) -> dict[str, OrtValue]:
        """Ids, masks and the past's length, except for inputs whose size changes."""
        graph = self._graph
        return {name: graph.zeros(name, self.batch) for name in graph.input_names if name != graph.growing}

    @cached_property
    def logits(self) -> OrtValue:
        """Logits of one token."""
        return self._graph.zeros(contract.LOGITS_OUTPUT, self.batch)

    @cached_property
    def bindings(self) -> list[Any]:
        """Bindings of steps from the first slot to the second, and back."""
        return [self._binding(source) for source in range(2)]

    @cached_property
    def options(self) -> list[RunOptions]:
        """Run options of these steps."""
        return [self._graph.run_options(next(self._graph.graph_ids)) for _ in range(2)]

    def _binding(self, source: int) -> Any:
        """Bind a step from one slot to the other. The addresses of inputs and outputs never change."""
        binding = self._graph.io_binding()
        for name, value in (self.inputs | self.cache | self.slots[source]).items():
            binding.bind_ortvalue_input(name, value)
        written = self.cache | self.slots[1 - source]
        for name in self._graph.output_names:
            value = self.logits if name == contract.LOGITS_OUTPUT else written[contract.past_name(name)]
            binding.bind_ortvalue_output(name, value)
        return binding

    def vacate(self, slot: int) -> None:
        """Copy the memory in `slot` for the past that uses it, if there is one."""
        owner = self.owners[slot]
        past = owner() if owner is not None else None
        if past is not None:
            past.memory = {name: copy_tensor(value) for name, value in past.memory.items()}
        self.owners[slot] = None

    def enter(self, slot: int, past: BufferedPast) -> None:
        """Make `slot` the place of the memory of `past`."""
        past.memory = self.slots[slot]
        self.owners[slot] = weakref.ref(past)

    def slot_of(self, past: BufferedPast) -> int:
        """Return the slot of the memory of `past`. A memory that is in neither slot is copied to the first one."""
        for slot, owner in enumerate(self.owners):
            if owner is not None and owner() is past:
                return slot
        self.vacate(0)
        for name, value in past.memory.items():
            self.slots[0][name].update_inplace(value)
        return 0


class BufferLease:
    """The use of buffers by the pasts that share their columns. When these pasts are gone, `idle` gets the buffers."""

    def __init__(self, buffers: Buffers, idle: list[Buffers] | None) -> None:
        self.buffers = buffers
        self.columns_used = 0  # number of columns that calls have written or are writing
        self.keep = None if idle is None else weakref.finalize(self, idle.append, buffers)  # for the next conversations
        if self.keep is not None:
            self.keep.atexit = False

    def spoil(self) -> None:
        """Do not reuse the buffers for other conversations."""
        if self.keep is not None:
            self.keep.detach()


class BufferedPast:
    """A batch of conversations between two calls. Its content never changes, but its memory can move.

    Args:
        lease: the buffers with its keys and values.
        mask: int64 `[B, P]`, mask of the tokens so far, 0 at padding. They take the first P columns of the buffers. If
            keys and values are packed, each row's valid tokens take the first of these columns.
        memory: states and open segments, by input name.
    """

    def __init__(self, lease: BufferLease, mask: NDArray[Any], memory: Mapping[str, OrtValue]) -> None:
        self.lease = lease
        self.mask = mask
        self.memory = dict(memory)

    @property
    def length(self) -> int:
        """P, the number of past columns."""
        return int(self.mask.shape[1])

"""Keep a group of rows in one set of buffers. A row that joins or leaves moves at most one other row.

    cache     [S, heads, N, width]   keys and values of S slots; a row's tokens are the first of its N columns
    memory    [S, ...]               states and open segments, twice: a step reads one and writes the other

The rows are in the first B slots. A graph with packed keys and values reads them in place, whatever their lengths.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltamem_tool.chat.generation import Token
from deltamem_tool.chat.group import PastRow
from deltamem_tool.memory.file import StoredMemory
from deltamem_tool.onnx import contract
from deltamem_tool.onnx.runtime.buffered_graph import FIRST_ROOM, BufferedGraph
from deltamem_tool.onnx.runtime.buffers import BufferedPast
from deltamem_tool.onnx.runtime.ortvalue import to_numpy, wrap_array

_COLUMNS = contract.INPUT_IDS, contract.WRITE_MASK, contract.SEGMENT_END  # inputs with one value per token


FIRST_SIZE = 8  # slots of the first buffers; unused slots take no memory


class _Arrays:
    """Buffers with `size` slots and `room` columns, and the bindings that run steps in them."""

    def __init__(self, graph: BufferedGraph, size: int, room: int) -> None:
        self.size, self.room = size, room
        self.cache = {name: _lazy_zeros(graph.zero_array(name, size, 0), room) for name in graph.cache_names}
        self.memory = [{name: graph.zero_array(name, size) for name in graph.memory_names} for _ in range(2)]
        self.source = 0  # index in `memory` of the part that the next step reads
        self.inputs = {name: graph.zero_array(name, size) for name in graph.input_names if name != graph.growing}
        self.logits = graph.zero_array(contract.LOGITS_OUTPUT, size)
        self._graph = graph
        self._bindings: dict[tuple[int, int], Any] = {}  # by rows and source

    def step(self, rows: int, mask: NDArray[Any]) -> NDArray[Any]:
        """Feed `inputs` to the first `rows` slots, whose tokens are counted by `mask`, and return their logits."""
        binding = self._binding(rows)
        binding.bind_cpu_input(contract.ATTENTION_MASK, mask)
        self._graph.run_bound(binding)
        self.source = 1 - self.source
        logits: NDArray[Any] = self.logits[:rows, -1]
        return logits

    def _binding(self, rows: int) -> Any:
        """Bind all inputs and outputs except for the mask. Their addresses never change."""
        key = rows, self.source
        if key not in self._bindings:
            graph = self._graph
            read, written = self.memory[self.source], self.memory[1 - self.source]
            binding = self._bindings[key] = graph.io_binding()
            for name, array in (self.inputs | self.cache | read).items():
                binding.bind_ortvalue_input(name, wrap_array(array[:rows], graph.types[name]))
            outputs = {contract.past_name(name): name for name in graph.output_names}
            for name, array in (self.cache | written).items():
                binding.bind_ortvalue_output(outputs[name], wrap_array(array[:rows], graph.types[name]))
            binding.bind_ortvalue_output(contract.LOGITS_OUTPUT, wrap_array(self.logits[:rows], contract.FLOAT32))
        return self._bindings[key]


def _lazy_zeros(like: NDArray[Any], room: int) -> NDArray[Any]:
    """Return zeros with the shape of `like` and `room` columns, whose pages are only allocated when they are written.

    Every slot has room for the longest row, and most rows are shorter. NumPy would request pages of 2 MB, all of which
    would be touched: writing zeros would take half a second when a long row joins 31 short ones.
    """
    shape = (*like.shape[:2], room, *like.shape[3:])
    size = math.prod(shape) * like.itemsize
    if not size:
        return np.zeros(shape, like.dtype)
    pages = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):  # on Linux
        pages.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(pages, like.dtype).reshape(shape)


class Slots:
    """A `deltamem_tool.chat.group.Group` for a graph on the CPU with packed keys and values of any length.

    Args:
        graph: the graph that the rows are fed to.
        adapter: fingerprint of the adapter, for the memories of the rows.
    """

    def __init__(self, graph: BufferedGraph, adapter: str) -> None:
        self._graph, self._adapter = graph, adapter
        self._lengths: list[int] = []  # tokens of each row
        self._arrays = _Arrays(graph, 0, 0)

    @staticmethod
    def fit(graph: Any) -> bool:
        """Return whether rows of `graph` can be kept in slots."""
        return isinstance(graph, BufferedGraph) and not graph.max_length and graph.device == "cpu"

    def exchange(self, leaving: Collection[int], joining: Sequence[PastRow]) -> list[int]:
        """See `Group.exchange`. The last rows move to the places of those that leave."""
        count = len(self._lengths) - len(leaving)
        places = list(range(count))
        if count or self._arrays.room <= FIRST_ROOM:
            holes = (row for row in places if row in leaving)
            movers = (row for row in range(count, len(self._lengths)) if row not in leaving)
            for hole, mover in zip(holes, movers, strict=True):
                self._move(mover, hole)
                places[hole] = mover
            for row in range(count, len(self._lengths)):
                self._wipe(row)
        else:
            self._arrays = _Arrays(self._graph, 0, 0)  # free the buffers, which may have grown for a long row
        del self._lengths[count:]
        self._reserve(count + len(joining), max((part.length for part in joining), default=0))
        for part in joining:
            self._append(part)
        return places

    def step(self, tokens: Sequence[Token]) -> NDArray[Any]:
        """See `Group.step`."""
        rows, width = len(tokens), max(self._lengths) + 1
        self._reserve(rows, width)
        for name, column in zip(_COLUMNS, zip(*tokens, strict=True), strict=True):
            if name in self._arrays.inputs:
                self._arrays.inputs[name][:rows, 0] = column
        self._lengths = [length + 1 for length in self._lengths]
        mask = np.arange(width) >= width - np.array(self._lengths)[:, None]
        return self._arrays.step(rows, mask.astype(np.int64))

    def memory(self, row: int) -> StoredMemory:
        """See `Group.memory`."""
        states, segments = (self._memory_part(row, part) for part in (contract.STATE, contract.SEGMENT))
        return StoredMemory(states, segments, self._adapter)

    def _memory_part(self, row: int, part: str) -> dict[int, NDArray[Any]]:
        names = {i: contract.carried_name(contract.PAST, i, part) for i in self._graph.interface.state_shapes}
        arrays = self._arrays.memory[self._arrays.source]
        return {i: arrays[name][row : row + 1].copy() for i, name in names.items() if name in arrays}

    def _append(self, part: PastRow) -> None:
        """Append a copy of a row."""
        past: BufferedPast = part.past
        row, arrays, length = len(self._lengths), self._arrays, part.length
        self._lengths.append(length)
        for name, value in past.lease.buffers.cache.items():
            arrays.cache[name][row, :, :length] = to_numpy(value)[part.row, :, :length]
        for name, value in past.memory.items():
            arrays.memory[arrays.source][name][row] = to_numpy(value)[part.row]

    def _move(self, row: int, place: int) -> None:
        """Move a row to the place of another."""
        self._wipe(place)
        length = self._lengths[place] = self._lengths[row]
        for array in self._arrays.cache.values():
            array[place, :, :length] = array[row, :, :length]
        for array in self._arrays.memory[self._arrays.source].values():
            array[place] = array[row]

    def _wipe(self, row: int) -> None:
        """Erase a row."""
        for array in self._arrays.cache.values():
            array[row, :, : self._lengths[row]] = 0
        for memory in self._arrays.memory:
            for array in memory.values():
                array[row] = 0

    def _reserve(self, rows: int, columns: int) -> None:
        """Provide at least this many slots and columns. If this needs new buffers, the rows are copied to them."""
        old, limit = self._arrays, self._graph.interface.room
        if rows <= old.size and columns <= old.room:
            return
        size = old.size if rows <= old.size else max(rows, 2 * old.size, FIRST_SIZE)
        room = old.room if columns <= old.room else max(FIRST_ROOM, 2 * columns)
        if limit is not None:
            room = max(columns, min(room, limit))
        new, rows, used = _Arrays(self._graph, size, room), len(self._lengths), max(self._lengths, default=0)
        self._arrays = new
        for name, array in old.cache.items():
            new.cache[name][:rows, :, :used] = array[:rows, :, :used]
        for name, array in old.memory[old.source].items():
            new.memory[new.source][name][:rows] = array[:rows]

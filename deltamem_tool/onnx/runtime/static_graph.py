"""A graph whose keys and values are of a fixed length: written where they are, call after call, in buffers that are
taken once; and decoded through bindings that do not change, which a CUDA graph can record and replay.

    Room        the buffers of one batch: keys and values, and what a decode step reads and writes
    FixedPast   some of a room's columns, and a memory

A call writes behind the columns of its past. So a past stays what it is as long as only one call has gone on from it;
a second one works on a copy of the room. Rooms that nobody uses any longer are kept for the next conversations.

ONNX Runtime runs a graph several times before it has recorded it. Therefore a step must give the same when it is run
again: keys and values may be written in place, states may not. They alternate between two slots of their room. And
prompts run between replays: ONNX Runtime 1.31.1 has the correction (its pull request 32121) that this needs.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnxruntime import OrtValue

from deltamem_tool.errors import ExportError
from deltamem_tool.onnx import contract
from deltamem_tool.onnx.contract import Interface
from deltamem_tool.onnx.runtime.graph import Graph, LoadedGraph, is_cache
from deltamem_tool.onnx.runtime.ortvalue import on_device, on_host

NOT_RECORDED = -1  # ONNX Runtime's gpu_graph_id of a call that it shall neither record nor replay
LONGEST_CALL = 1024  # tokens: attention takes room for tokens × max_length, so longer prompts are fed in pieces


class Room:
    """Keys and values of one batch, `[B, heads, N, width]` by input name, where decode steps are bound to them."""

    def __init__(self, graph: FixedGraph, batch: int) -> None:
        self.batch = batch
        self.lock = threading.RLock()
        self.cache = {name: graph.zeros(name, batch) for name in graph.cache_names}
        # What a step reads, what it writes, and the past whose memory is there, as long as somebody has it.
        self.slots = [{name: graph.zeros(name, batch) for name in graph.memory_names} for _ in range(2)]
        self.tenants: list[weakref.ref[FixedPast] | None] = [None, None]
        self.given = {name: graph.zeros(name, batch) for name in graph.given_names}  # ids, masks and the past's length
        self.logits = graph.zeros(contract.LOGITS_OUTPUT, batch)
        self.bindings = [self._binding(graph, source) for source in range(2)]
        self.options = [graph.run_options(next(graph.graph_ids)) for _ in range(2)]

    def _binding(self, graph: FixedGraph, source: int) -> Any:
        """A step from one slot to the other. Inputs and outputs stay where they are for good."""
        binding = graph.io_binding()
        for name, value in (self.given | self.cache | self.slots[source]).items():
            binding.bind_ortvalue_input(name, value)
        written = self.cache | self.slots[1 - source]
        for name in graph.output_names:
            value = self.logits if name == contract.LOGITS_OUTPUT else written[contract.past_name(name)]
            binding.bind_ortvalue_output(name, value)
        return binding

    def vacate(self, slot: int) -> None:
        """A past that has its memory in `slot` gets a copy of its own."""
        tenant = self.tenants[slot]
        past = tenant() if tenant is not None else None
        if past is not None:
            past.memory = {name: _copy(value) for name, value in past.memory.items()}
        self.tenants[slot] = None

    def enter(self, slot: int, past: FixedPast) -> None:
        past.memory = self.slots[slot]
        self.tenants[slot] = weakref.ref(past)

    def slot_of(self, past: FixedPast) -> int:
        """Where `past` has its memory; it moves into the first slot, if it is in none."""
        for slot, tenant in enumerate(self.tenants):
            if tenant is not None and tenant() is past:
                return slot
        self.vacate(0)
        for name, value in past.memory.items():
            self.slots[0][name].update_inplace(value)
        return 0


class Tenancy:
    """The use of a room by the pasts that hold it, which share its columns. The room is free when they are gone."""

    def __init__(self, room: Room, idle: list[Room]) -> None:
        self.room = room
        self.taken = 0  # columns that a call has written, or is writing
        self.keep = weakref.finalize(self, idle.append, room)  # for the next conversations
        self.keep.atexit = False


class FixedPast:
    """A batch of conversations between two calls. What it says never changes; where its memory is may.

    Args:
        tenancy: the room that its keys and values are in.
        length: columns of the room that are its own, from the first.
        memory: states and open segments, by input name.
    """

    def __init__(self, tenancy: Tenancy, length: int, memory: Mapping[str, OrtValue]) -> None:
        self.tenancy = tenancy
        self.length = length
        self.memory = dict(memory)


class FixedGraph(LoadedGraph):
    """A graph of fixed length: what `Graph` does, but its pasts are `FixedPast` and hold at most `max_length` tokens.

    Args:
        cuda_graph: record decode steps as CUDA graphs and replay them. Then all calls must come from one thread. This
            has not been run on a GPU yet; the bindings that it needs are those of every decode step, on any provider.

    Raises:
        ExportError: as `Graph`; or `cuda_graph` on another provider than "cuda".
    """

    def __init__(
        self,
        folder: str | Path,
        interface: Interface,
        provider: str = "cpu",
        threads: int | None = None,
        map_weights: bool = False,
        cuda_graph: bool = False,
    ) -> None:
        if cuda_graph and provider != "cuda":
            raise _no_cuda_graph(f"The provider is {provider}.", 'Choose provider="cuda", or leave cuda_graph out.')
        options = {"enable_cuda_graph": "1"} if cuda_graph else {}
        super().__init__(folder, interface, provider, threads, map_weights, options)
        self.max_length = interface.max_length
        self.output_names = list(interface.outputs())
        inputs = list(interface.inputs())
        self.cache_names = [name for name in inputs if is_cache(name)]
        self.given_names = [name for name in inputs if not name.startswith(contract.PAST + ".")]
        self.memory_names = [name for name in inputs if name not in (*self.cache_names, *self.given_names)]
        self.graph_ids: Iterator[int] = count(1)
        self._cuda_graph = cuda_graph  # whether steps are recorded and replayed; they run through bindings in any case
        self._thread: int | None = None
        self._idle: dict[int, list[Room]] = {}  # by batch

    def io_binding(self) -> Any:
        return self._session.io_binding()

    def run_options(self, graph_id: int) -> onnxruntime.RunOptions:
        """Of a call that is recorded under `graph_id`, where CUDA graphs are on."""
        options = onnxruntime.RunOptions()
        if self._cuda_graph:
            options.add_run_config_entry("gpu_graph_id", str(graph_id))
        return options

    def zeros(self, name: str, batch: int) -> OrtValue:
        """A buffer for an input or output of a call with one token. Its numbers must be finite from the start: what
        attention leaves out is multiplied by zero."""
        dtype, shape = (self.interface.inputs() | self.interface.outputs())[name]
        sizes = [{contract.BATCH: batch, contract.TOKENS: 1}[s] if isinstance(s, str) else s for s in shape]
        return on_device(np.zeros(sizes, np.uint16 if dtype == contract.BFLOAT16 else dtype), dtype, self.device)

    def empty_past(
        self,
        batch: int,
        states: Mapping[int, NDArray[Any]] | None = None,
        segments: Mapping[int, NDArray[Any]] | None = None,
    ) -> FixedPast:
        return FixedPast(self._tenancy(batch), 0, self.memory_values(batch, states, segments))

    def with_memory(
        self, past: FixedPast, states: Mapping[int, NDArray[Any]], segments: Mapping[int, NDArray[Any]]
    ) -> FixedPast:
        memory = self.memory_values(past.tenancy.room.batch, states, segments)
        return FixedPast(past.tenancy, past.length, memory)

    def states(self, past: FixedPast) -> dict[int, NDArray[Any]]:
        """As `Graph.states`."""
        with past.tenancy.room.lock:
            return self.memory_of(past.memory, contract.STATE)

    def segments(self, past: FixedPast) -> dict[int, NDArray[Any]]:
        """As `Graph.segments`."""
        with past.tenancy.room.lock:
            return self.memory_of(past.memory, contract.SEGMENT) if self.interface.segment else {}

    def step(
        self,
        input_ids: NDArray[Any],
        attention_mask: NDArray[Any],
        write_mask: NDArray[Any],
        past: FixedPast,
        segment_end: NDArray[Any] | None = None,
    ) -> tuple[NDArray[Any], FixedPast]:
        """As `Graph.step`, with the same masks: `attention_mask` is `[B, P + T]`.

        Raises:
            ExportError: P + T is more than `max_length`; nothing has been run.
        """
        tokens, columns = input_ids.shape[1], attention_mask.shape[1]
        if columns > self.max_length:
            raise ExportError(
                f"The graph has room for {self.max_length} tokens, and {columns} are needed.",
                f"It was exported with --max-length {self.max_length}.",
                "Take a smaller window, or export it with a larger --max-length.",
            )
        if columns != past.length + tokens:
            raise ValueError(f"a mask of {columns} columns for {past.length} past tokens and {tokens} new ones")
        self._refuse_other_threads()
        mask = np.zeros((len(input_ids), self.max_length), np.int64)
        mask[:, :columns] = attention_mask
        logits = []
        for start in range(0, tokens, LONGEST_CALL):
            piece = slice(start, min(start + LONGEST_CALL, tokens))
            # Columns behind the piece are not there yet: it is causal, and they are masked by that.
            given = {
                contract.INPUT_IDS: input_ids[:, piece],
                contract.ATTENTION_MASK: mask,
                contract.WRITE_MASK: write_mask[:, piece],
                contract.PAST_LENGTH: np.array([past.length], np.int64),
                contract.SEGMENT_END: None if segment_end is None else segment_end[:, piece],
            }
            found, past = self._call({name: np.ascontiguousarray(given[name]) for name in self.given_names}, past)
            logits.append(found)
        return logits[-1] if self.interface.logits == "last" else np.concatenate(logits, axis=1), past

    def take(self, past: FixedPast, row: int, columns: NDArray[Any]) -> FixedPast:
        """As `Graph.take`. The beginning of a single conversation stays in its room; all else is copied."""
        room = past.tenancy.room
        with room.lock:
            memory = self._on_device({name: on_host(value)[row : row + 1] for name, value in past.memory.items()})
            if room.batch == 1 and np.array_equal(columns, np.arange(len(columns))):
                return FixedPast(past.tenancy, len(columns), memory)
            cache = {name: on_host(value)[row : row + 1, :, columns] for name, value in room.cache.items()}
        return self._furnished(cache, len(columns), memory)

    def join(self, pasts: Sequence[FixedPast]) -> FixedPast:
        if len(pasts) == 1:
            return pasts[0]
        length = max(past.length for past in pasts)
        parts: list[dict[str, NDArray[Any]]] = []
        for past in pasts:
            with past.tenancy.room.lock:
                padding = ((0, 0), (0, 0), (length - past.length, 0), (0, 0))
                cache = past.tenancy.room.cache.items()
                arrays = {name: np.pad(on_host(value)[:, :, : past.length], padding) for name, value in cache}
                parts.append(arrays | {name: on_host(value).copy() for name, value in past.memory.items()})
        joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        memory = self._on_device({name: joined[name] for name in self.memory_names})
        return self._furnished({name: joined[name] for name in self.cache_names}, length, memory)

    def _call(self, given: dict[str, NDArray[Any]], past: FixedPast) -> tuple[NDArray[Any], FixedPast]:
        tokens = given[contract.INPUT_IDS].shape[1]
        past = self._alone(past, tokens)
        with past.tenancy.room.lock:
            logits, after = (self._decode if tokens == 1 else self._prefill)(given, past)
        after.length = past.length + tokens
        if not np.isfinite(logits).all():
            past.tenancy.keep.detach()  # what is no number in these buffers would be none in the next conversation
        return logits, after

    def _alone(self, past: FixedPast, tokens: int) -> FixedPast:
        """`past`, if nothing was written behind it, else the same in a room of its own; with so many columns behind it
        that nobody else writes."""
        tenancy = past.tenancy
        with tenancy.room.lock:
            if tenancy.taken == past.length:
                tenancy.taken += tokens
                return past
            own = self._tenancy(tenancy.room.batch)
            for name, value in tenancy.room.cache.items():
                own.room.cache[name].update_inplace(value)
            own.taken = past.length + tokens
            return FixedPast(own, past.length, {name: _copy(value) for name, value in past.memory.items()})

    def _prefill(self, given: dict[str, NDArray[Any]], past: FixedPast) -> tuple[NDArray[Any], FixedPast]:
        room = past.tenancy.room
        binding = self.io_binding()
        for name, array in given.items():
            binding.bind_cpu_input(name, array)
        for name, value in (room.cache | past.memory).items():
            binding.bind_ortvalue_input(name, value)
        for name in self.output_names:
            if is_cache(name):
                binding.bind_ortvalue_output(name, room.cache[contract.past_name(name)])
            else:
                binding.bind_output(name, "cpu" if name == contract.LOGITS_OUTPUT else self.device)
        self._session.run_with_iobinding(binding, self.run_options(NOT_RECORDED))
        found = dict(zip(self.output_names, binding.get_outputs(), strict=True))
        logits = found.pop(contract.LOGITS_OUTPUT)
        memory = {contract.past_name(name): value for name, value in found.items() if not is_cache(name)}
        return logits.numpy(), FixedPast(past.tenancy, 0, memory)

    def _decode(self, given: dict[str, NDArray[Any]], past: FixedPast) -> tuple[NDArray[Any], FixedPast]:
        room = past.tenancy.room
        source = room.slot_of(past)
        room.vacate(1 - source)
        for name, array in given.items():
            room.given[name].update_inplace(array)
        self._session.run_with_iobinding(room.bindings[source], room.options[source])
        after = FixedPast(past.tenancy, 0, {})
        room.enter(1 - source, after)
        return on_host(room.logits).copy(), after

    def _tenancy(self, batch: int) -> Tenancy:
        """Of a free room, a new one if there is none."""
        idle = self._idle.setdefault(batch, [])
        try:
            room = idle.pop()
        except IndexError:
            room = Room(self, batch)
        return Tenancy(room, idle)

    def _furnished(self, cache: Mapping[str, NDArray[Any]], length: int, memory: Mapping[str, OrtValue]) -> FixedPast:
        """A past in a room of its own, with the given keys and values `[B, heads, length, width]`."""
        tenancy = self._tenancy(len(next(iter(cache.values()))))
        tenancy.taken = length
        for name, array in cache.items():
            buffer = tenancy.room.cache[name]
            whole = np.pad(array, ((0, 0), (0, 0), (0, self.max_length - length), (0, 0)))
            buffer.update_inplace(on_device(whole, self.interface.dtype, self.device))
        return FixedPast(tenancy, length, memory)

    def _on_device(self, memory: Mapping[str, NDArray[Any]]) -> dict[str, OrtValue]:
        return {name: on_device(array, contract.FLOAT32, self.device) for name, array in memory.items()}

    def _refuse_other_threads(self) -> None:
        """
        Raises:
            ExportError: CUDA graphs are on, and another thread has made the first call.
        """
        here = threading.get_ident()
        self._thread = self._thread or here
        if self._cuda_graph and self._thread != here:
            raise _no_cuda_graph("ONNX Runtime keeps them for one thread.", "Make all calls from the same one.")


def open_graph(
    folder: str | Path,
    interface: Interface,
    provider: str = "cpu",
    threads: int | None = None,
    map_weights: bool = False,
    cuda_graph: bool = False,
) -> Graph | FixedGraph:
    """The graph in `folder`, of the kind that its interface says.

    Raises:
        ExportError: it cannot be loaded as it is asked for: see `Graph` and `FixedGraph`.
    """
    if interface.max_length:
        return FixedGraph(folder, interface, provider, threads, map_weights, cuda_graph)
    if cuda_graph:
        raise _no_cuda_graph("Its keys and values grow with the text.", "Export it with --max-length.")
    return Graph(folder, interface, provider, threads, map_weights)


def _no_cuda_graph(why: str, next: str) -> ExportError:
    return ExportError("This graph cannot run as a CUDA graph.", why, next)


def _copy(value: OrtValue) -> OrtValue:
    copy = OrtValue.ortvalue_from_shape_and_type(value.shape(), value.element_type(), value.device_name())
    copy.update_inplace(value)
    return copy

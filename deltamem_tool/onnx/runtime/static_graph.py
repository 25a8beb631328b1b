"""A graph whose keys and values have a fixed length.

They are written where they are, call after call, in buffers that are allocated once; decode steps run through bindings
that do not change, which a CUDA graph can record and replay.

    Buffers      of one batch: keys and values, and what a decode step reads and writes
    StaticPast   some columns of the buffers, and a memory

A call writes behind the columns of its past. So a past stays what it is as long as only one call continues it; a second
one works on a copy of the buffers. Buffers that nobody uses any longer are kept for the next conversations.

ONNX Runtime runs a graph several times before it has recorded it. Therefore a step must give the same when it is run
again: keys and values may be written in place, states may not. They alternate between two slots of their buffers. And
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
from deltamem_tool.onnx.runtime.graph import Graph, LoadedGraph, is_cache, joined_rows, one_row
from deltamem_tool.onnx.runtime.ortvalue import on_device, on_host

NOT_RECORDED = -1  # ONNX Runtime's gpu_graph_id of a call that it shall neither record nor replay
LONGEST_CALL = 1024  # tokens: attention takes room for tokens × max_length, so longer prompts are fed in pieces


class Buffers:
    """Keys and values of one batch, `[B, heads, N, width]` by input name, where decode steps are bound to them."""

    def __init__(self, graph: StaticGraph, batch: int) -> None:
        self.batch = batch
        self.lock = threading.RLock()
        self.cache = {name: graph.zeros(name, batch) for name in graph.cache_names}
        # What a step reads, what it writes, and the past whose memory is there, as long as somebody has it.
        self.slots = [{name: graph.zeros(name, batch) for name in graph.memory_names} for _ in range(2)]
        self.owners: list[weakref.ref[StaticPast] | None] = [None, None]
        self.inputs = {name: graph.zeros(name, batch) for name in graph.input_names}  # ids, masks and the past's length
        self.logits = graph.zeros(contract.LOGITS_OUTPUT, batch)
        self.bindings = [self._binding(graph, source) for source in range(2)]
        self.options = [graph.run_options(next(graph.graph_ids)) for _ in range(2)]

    def _binding(self, graph: StaticGraph, source: int) -> Any:
        """A step from one slot to the other. Inputs and outputs stay where they are for good."""
        binding = graph.io_binding()
        for name, value in (self.inputs | self.cache | self.slots[source]).items():
            binding.bind_ortvalue_input(name, value)
        written = self.cache | self.slots[1 - source]
        for name in graph.output_names:
            value = self.logits if name == contract.LOGITS_OUTPUT else written[contract.past_name(name)]
            binding.bind_ortvalue_output(name, value)
        return binding

    def vacate(self, slot: int) -> None:
        """Move the past that has its memory in `slot` to a copy."""
        owner = self.owners[slot]
        past = owner() if owner is not None else None
        if past is not None:
            past.memory = {name: _copy(value) for name, value in past.memory.items()}
        self.owners[slot] = None

    def enter(self, slot: int, past: StaticPast) -> None:
        """Let `past` have its memory in `slot`."""
        past.memory = self.slots[slot]
        self.owners[slot] = weakref.ref(past)

    def slot_of(self, past: StaticPast) -> int:
        """Return the slot of the memory of `past`, which moves into the first one if it is in none."""
        for slot, owner in enumerate(self.owners):
            if owner is not None and owner() is past:
                return slot
        self.vacate(0)
        for name, value in past.memory.items():
            self.slots[0][name].update_inplace(value)
        return 0


class BufferLease:
    """The use of buffers by the pasts that share their columns. The buffers are free when these pasts are gone."""

    def __init__(self, buffers: Buffers, idle: list[Buffers]) -> None:
        self.buffers = buffers
        self.taken = 0  # columns that a call has written, or is writing
        self.keep = weakref.finalize(self, idle.append, buffers)  # for the next conversations
        self.keep.atexit = False


class StaticPast:
    """A batch of conversations between two calls. Its content never changes; where its memory is may.

    Args:
        lease: the buffers that its keys and values are in.
        length: how many of their columns are its own, from the first.
        memory: states and open segments, by input name.
    """

    def __init__(self, lease: BufferLease, length: int, memory: Mapping[str, OrtValue]) -> None:
        self.lease = lease
        self.length = length
        self.memory = dict(memory)


class StaticGraph(LoadedGraph):
    """A graph of fixed length: what `Graph` does, but its pasts are `StaticPast` and hold at most `max_length` tokens.

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
        inputs = list(interface.inputs())
        self.cache_names = [name for name in inputs if is_cache(name)]
        self.input_names = [name for name in inputs if not name.startswith(contract.PAST + ".")]
        self.memory_names = [name for name in inputs if name not in (*self.cache_names, *self.input_names)]
        self.graph_ids: Iterator[int] = count(1)
        self._cuda_graph = cuda_graph  # whether steps are recorded and replayed; they run through bindings in any case
        self._thread: int | None = None
        self._idle: dict[int, list[Buffers]] = {}  # by batch

    def io_binding(self) -> Any:
        """Return an empty binding of the session."""
        return self._session.io_binding()

    def run_options(self, graph_id: int) -> onnxruntime.RunOptions:
        """Options of a call that is recorded under `graph_id`, where CUDA graphs are on."""
        options = onnxruntime.RunOptions()
        if self._cuda_graph:
            options.add_run_config_entry("gpu_graph_id", str(graph_id))
        return options

    def zeros(self, name: str, batch: int) -> OrtValue:
        """A buffer for an input or output of a call with one token.

        Its numbers must be finite from the start: attention multiplies what it leaves out by zero.
        """
        dtype, shape = (self.interface.inputs() | self.interface.outputs())[name]
        sizes = [{contract.BATCH: batch, contract.TOKENS: 1}[s] if isinstance(s, str) else s for s in shape]
        return on_device(np.zeros(sizes, np.uint16 if dtype == contract.BFLOAT16 else dtype), dtype, self.device)

    def empty_past(
        self,
        batch: int,
        states: Mapping[int, NDArray[Any]] | None = None,
        segments: Mapping[int, NDArray[Any]] | None = None,
    ) -> StaticPast:
        """As `Graph.empty_past`."""
        return StaticPast(self._lease(batch), 0, self.memory_values(batch, states, segments))

    def with_memory(
        self, past: StaticPast, states: Mapping[int, NDArray[Any]], segments: Mapping[int, NDArray[Any]]
    ) -> StaticPast:
        """As `Graph.with_memory`."""
        memory = self.memory_values(past.lease.buffers.batch, states, segments)
        return StaticPast(past.lease, past.length, memory)

    def memory_part(self, past: StaticPast, part: str) -> dict[int, NDArray[Any]]:
        """The arrays of `part` by layer, read while no step writes into the buffers."""
        with past.lease.buffers.lock:
            return super().memory_part(past.memory, part)

    def step(
        self,
        input_ids: NDArray[Any],
        attention_mask: NDArray[Any],
        write_mask: NDArray[Any],
        past: StaticPast,
        segment_end: NDArray[Any] | None = None,
    ) -> tuple[NDArray[Any], StaticPast]:
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
        self._check_thread()
        mask = np.zeros((len(input_ids), self.max_length), np.int64)
        mask[:, :columns] = attention_mask
        logits = []
        for start in range(0, tokens, LONGEST_CALL):
            piece = slice(start, min(start + LONGEST_CALL, tokens))
            # Columns behind the piece are not there yet: it is causal, and they are masked by that.
            feeds = {
                contract.INPUT_IDS: input_ids[:, piece],
                contract.ATTENTION_MASK: mask,
                contract.WRITE_MASK: write_mask[:, piece],
                contract.PAST_LENGTH: np.array([past.length], np.int64),
                contract.SEGMENT_END: None if segment_end is None else segment_end[:, piece],
            }
            arrays = {name: np.ascontiguousarray(feeds[name]) for name in self.input_names}
            piece_logits, past = self._call(arrays, past)
            logits.append(piece_logits)
        return logits[-1] if self.interface.logits == "last" else np.concatenate(logits, axis=1), past

    def take(self, past: StaticPast, row: int, columns: NDArray[Any]) -> StaticPast:
        """As `Graph.take`. The beginning of a single conversation stays in its buffers; all else is copied."""
        buffers = past.lease.buffers
        with buffers.lock:
            if buffers.batch == 1 and np.array_equal(columns, np.arange(len(columns))):
                return StaticPast(past.lease, len(columns), {n: _copy(value) for n, value in past.memory.items()})
            return self._placed(one_row(buffers.cache | past.memory, row, columns), len(columns))

    def join(self, pasts: Sequence[StaticPast]) -> StaticPast:
        """As `Graph.join`."""
        if len(pasts) == 1:
            return pasts[0]
        rows: list[dict[str, NDArray[Any]]] = []
        for past in pasts:
            with past.lease.buffers.lock:
                cache = {n: on_host(value)[:, :, : past.length].copy() for n, value in past.lease.buffers.cache.items()}
                rows.append(cache | {name: on_host(value).copy() for name, value in past.memory.items()})
        return self._placed(joined_rows(rows), max(past.length for past in pasts))

    def _call(self, arrays: dict[str, NDArray[Any]], past: StaticPast) -> tuple[NDArray[Any], StaticPast]:
        tokens = arrays[contract.INPUT_IDS].shape[1]
        past = self._exclusive(past, tokens)
        with past.lease.buffers.lock:
            logits, after = (self._decode if tokens == 1 else self._prefill)(arrays, past)
        after.length = past.length + tokens
        if not np.isfinite(logits).all():
            past.lease.keep.detach()  # what is no number in these buffers would be none in the next conversation
        return logits, after

    def _exclusive(self, past: StaticPast, tokens: int) -> StaticPast:
        """Reserve `tokens` columns behind `past`; of a copy in other buffers, if something was written there."""
        lease = past.lease
        with lease.buffers.lock:
            if lease.taken == past.length:
                lease.taken += tokens
                return past
            other = self._lease(lease.buffers.batch)
            for name, value in lease.buffers.cache.items():
                other.buffers.cache[name].update_inplace(value)
            other.taken = past.length + tokens
            return StaticPast(other, past.length, {name: _copy(value) for name, value in past.memory.items()})

    def _prefill(self, arrays: dict[str, NDArray[Any]], past: StaticPast) -> tuple[NDArray[Any], StaticPast]:
        cache = past.lease.buffers.cache
        logits, carried = self._run(arrays, cache | past.memory, cache, self.run_options(NOT_RECORDED))
        return logits, StaticPast(past.lease, 0, {name: carried[name] for name in self.memory_names})

    def _decode(self, arrays: dict[str, NDArray[Any]], past: StaticPast) -> tuple[NDArray[Any], StaticPast]:
        buffers = past.lease.buffers
        source = buffers.slot_of(past)
        buffers.vacate(1 - source)
        for name, array in arrays.items():
            buffers.inputs[name].update_inplace(array)
        self._session.run_with_iobinding(buffers.bindings[source], buffers.options[source])
        after = StaticPast(past.lease, 0, {})
        buffers.enter(1 - source, after)
        return on_host(buffers.logits).copy(), after

    def _lease(self, batch: int) -> BufferLease:
        """Take free buffers, or allocate new ones."""
        idle = self._idle.setdefault(batch, [])
        try:
            buffers = idle.pop()
        except IndexError:
            buffers = Buffers(self, batch)
        return BufferLease(buffers, idle)

    def _placed(self, arrays: Mapping[str, NDArray[Any]], length: int) -> StaticPast:
        """A past in buffers of its own, from carried tensors with keys and values `[B, heads, length, width]`."""
        lease = self._lease(len(next(iter(arrays.values()))))
        lease.taken = length
        for name, buffer in lease.buffers.cache.items():
            whole = np.pad(arrays[name], ((0, 0), (0, 0), (0, self.max_length - length), (0, 0)))
            buffer.update_inplace(on_device(whole, self.interface.dtype, self.device))
        return StaticPast(lease, length, self._on_device({name: arrays[name] for name in self.memory_names}))

    def _check_thread(self) -> None:
        """Check that the call comes from the thread of the first one, where CUDA graphs are on.

        Raises:
            ExportError: it comes from another thread.
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
) -> Graph | StaticGraph:
    """The graph in `folder`, of the kind that its interface says.

    Raises:
        ExportError: it cannot be loaded as it is asked for: see `Graph` and `StaticGraph`.
    """
    if interface.max_length:
        return StaticGraph(folder, interface, provider, threads, map_weights, cuda_graph)
    if cuda_graph:
        raise _no_cuda_graph("Its keys and values grow with the text.", "Export it with --max-length.")
    return Graph(folder, interface, provider, threads, map_weights)


def _no_cuda_graph(why: str, next: str) -> ExportError:
    return ExportError("This graph cannot run as a CUDA graph.", why, next)


def _copy(value: OrtValue) -> OrtValue:
    copy = OrtValue.ortvalue_from_shape_and_type(value.shape(), value.element_type(), value.device_name())
    copy.update_inplace(value)
    return copy

"""A graph that writes keys and values in place, call after call, into buffers with room for more.

Decode steps run through fixed bindings. If the length is fixed, a CUDA graph can record and replay them. Otherwise, a
conversation that has filled its buffers continues in larger ones.

A call writes after the columns of its past, so a past stays valid as long as only one call continues it. A second call
works on a copy of the buffers. Unused buffers of a fixed length are kept for the next conversations. Prompts run
between replays, which needs a fix in ONNX Runtime 1.31.1 (pull request 32121).
"""

from __future__ import annotations

import threading
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
from deltamem_tool.onnx.runtime.buffers import BufferedPast, BufferLease, Buffers
from deltamem_tool.onnx.runtime.graph import Graph, LoadedGraph, Past, is_cache, join_rows, select_row
from deltamem_tool.onnx.runtime.ortvalue import copy_tensor, to_device, to_numpy, wrap_array
from deltamem_tool.onnx.runtime.rows_graph import RowsGraph

NOT_RECORDED = -1  # ONNX Runtime's gpu_graph_id for a call that is neither recorded nor replayed
# In tokens. A long prompt is fed in pieces, because attention takes memory, and in ONNX Runtime's CPU provider also
# time, for every pair of a token and a column, even for masked ones.
LONGEST_CALL = 512
FIRST_ROOM = 256  # columns of a conversation's first buffers, if the length is not fixed


class BufferedGraph(LoadedGraph):
    """A graph of fixed length or with packed keys and values: the same as `Graph`, with `BufferedPast` as pasts.

    Args:
        cuda_graph: record decode steps as CUDA graphs and replay them. All calls must then come from one thread. This
            has not been run on a GPU yet, but every decode step uses the same bindings on any provider.

    Raises:
        ExportError: as for `Graph`, or `cuda_graph` is set and the provider is not "cuda".
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
            raise _cuda_graph_error(f"The provider is {provider}.", 'Choose provider="cuda", or leave cuda_graph out.')
        options = {"enable_cuda_graph": "1"} if cuda_graph else {}
        super().__init__(folder, interface, provider, threads, map_weights, options)
        self.max_length = interface.max_length  # 0 if buffers can have any length
        described = interface.inputs() | interface.outputs()
        self.types = {name: dtype for name, (dtype, _) in described.items()}
        self._shapes = {name: shape for name, (_, shape) in described.items()}
        inputs = list(interface.inputs())
        self.growing = None if self.max_length else contract.ATTENTION_MASK  # the input whose size changes
        self.cache_names = [name for name in inputs if is_cache(name)]
        self.input_names = [name for name in inputs if not name.startswith(contract.PAST + ".")]
        self.memory_names = [name for name in inputs if name not in (*self.cache_names, *self.input_names)]
        self.graph_ids: Iterator[int] = count(1)
        self._cuda_graph = cuda_graph  # whether steps are recorded and replayed; all steps use bindings
        self._thread: int | None = None
        self._idle: dict[int, list[Buffers]] = {}  # by batch size; used if the length is fixed

    def io_binding(self) -> Any:
        """Return an empty binding of the session."""
        return self._session.io_binding()

    def run_options(self, graph_id: int) -> onnxruntime.RunOptions:
        """Return the options of a call, which is recorded under `graph_id` if CUDA graphs are on."""
        options = onnxruntime.RunOptions()
        if self._cuda_graph:
            options.add_run_config_entry("gpu_graph_id", str(graph_id))
        return options

    def zeros(self, name: str, batch: int, room: int = 0) -> OrtValue:
        """Return a buffer for an input or output of a call with one token; keys and values have `room` columns.

        Its values must be finite from the start, because attention multiplies masked ones by zero.
        """
        array = self.zero_array(name, batch, room)
        if self.device == "cpu":
            return wrap_array(array, self.types[name])  # the system allocates pages when they are written
        return to_device(array, self.types[name], self.device)

    def zero_array(self, name: str, batch: int, room: int = 0) -> NDArray[Any]:
        """Do the same as `zeros`, as an array."""
        known = {contract.BATCH: batch, contract.TOKENS: 1, contract.PAST_TOKENS: room}
        sizes = [known[s] if isinstance(s, str) else s for s in self._shapes[name]]
        return np.zeros(sizes, np.uint16 if self.types[name] == contract.BFLOAT16 else self.types[name])

    def run_bound(self, binding: Any, options: onnxruntime.RunOptions | None = None) -> None:
        """Call the graph with bound inputs and outputs."""
        self._session.run_with_iobinding(binding, options)

    def empty_past(
        self,
        batch: int,
        states: Mapping[int, NDArray[Any]] | None = None,
        segments: Mapping[int, NDArray[Any]] | None = None,
    ) -> BufferedPast:
        """See `Graph.empty_past`."""
        return BufferedPast(self._lease(batch, 0), np.zeros((batch, 0), np.int64), self._start(batch, states, segments))

    def _start(
        self, batch: int, states: Mapping[int, NDArray[Any]] | None, segments: Mapping[int, NDArray[Any]] | None
    ) -> Past:
        initial = self.initial_values(batch, states)
        return self.base_values(batch) | initial | self.memory_values(batch, None if initial else states, segments)

    def with_memory(
        self, past: BufferedPast, states: Mapping[int, NDArray[Any]], segments: Mapping[int, NDArray[Any]]
    ) -> BufferedPast:
        """See `Graph.with_memory`."""
        memory = self.memory_values(past.lease.buffers.batch, states, segments)
        return BufferedPast(past.lease, past.mask, past.memory | memory)

    def memory_part(self, past: BufferedPast, part: str) -> dict[int, NDArray[Any]]:
        """Return the arrays of `part` by layer, read while no step writes into the buffers."""
        with past.lease.buffers.lock:
            return super().memory_part(past.memory, part)

    def step(
        self,
        input_ids: NDArray[Any],
        attention_mask: NDArray[Any],
        write_mask: NDArray[Any],
        past: BufferedPast,
        segment_end: NDArray[Any] | None = None,
    ) -> tuple[NDArray[Any], BufferedPast]:
        """See `Graph.step`. The masks are the same: `attention_mask` is `[B, P + T]`.

        Raises:
            ExportError: P + T is more than `max_length`; nothing was run.
        """
        (batch, tokens), columns = input_ids.shape, attention_mask.shape[1]
        if self.max_length and columns > self.max_length:
            raise ExportError(
                f"The graph has room for {self.max_length} tokens, and {columns} are needed.",
                f"It was exported with --max-length {self.max_length}.",
                "Use a smaller window, or export with a larger --max-length.",
            )
        if columns != past.length + tokens:
            raise ValueError(f"a mask of {columns} columns for {past.length} past tokens and {tokens} new ones")
        self._check_thread()
        valid = attention_mask[:, past.length :]
        feeds = {contract.INPUT_IDS: input_ids, contract.ATTENTION_MASK: valid}
        if contract.WRITE_MASK in self.input_names:
            feeds[contract.WRITE_MASK] = write_mask
        if segment_end is not None:
            feeds[contract.SEGMENT_END] = segment_end
        several = batch > 1 and self.interface.packed
        logits = []
        for start in range(0, tokens, LONGEST_CALL):
            piece = {name: array[:, start : start + LONGEST_CALL] for name, array in feeds.items()}
            # The attention of packed keys and values does not support several rows with several tokens after a past.
            alone = several and piece[contract.INPUT_IDS].shape[1] > 1 and bool(past.length or self.max_length)
            piece_logits, past = (self._row_by_row if alone else self._call)(piece, past)
            logits.append(piece_logits)
        return self._last(logits, valid), past

    def _last(self, logits: list[NDArray[Any]], valid: NDArray[Any]) -> NDArray[Any]:
        """Return the logits of all pieces, of the last piece, or for each row those of its last piece with tokens."""
        if self.interface.logits == "all":
            return np.concatenate(logits, axis=1)
        if len(logits) == 1 or not self.interface.packed:
            return logits[-1]
        last = [int(columns[-1]) // LONGEST_CALL if len(columns) else -1 for columns in map(np.flatnonzero, valid)]
        return np.stack([logits[piece][row] for row, piece in enumerate(last)])

    def _row_by_row(self, feeds: dict[str, NDArray[Any]], past: BufferedPast) -> tuple[NDArray[Any], BufferedPast]:
        """Do the same as `_call`, row by row."""
        rows = []
        for row in range(len(past.mask)):
            alone = self.take(past, row, np.arange(past.length))
            rows.append(self._call({name: array[row : row + 1] for name, array in feeds.items()}, alone))
        return np.concatenate([logits for logits, _ in rows]), self.join([after for _, after in rows])

    def size(self, past: BufferedPast) -> int:
        """See `Graph.size`. All columns of the buffers count."""
        values = (*past.lease.buffers.cache.values(), *past.memory.values())
        return sum(value.tensor_size_in_bytes() for value in values)

    def take(self, past: BufferedPast, row: int, columns: NDArray[Any]) -> BufferedPast:
        """See `Graph.take`. The beginning of a single conversation stays in its buffers; anything else is copied."""
        buffers = past.lease.buffers
        mask = past.mask[row : row + 1, columns]
        if self.interface.base_states and mask.sum() != past.mask[row].sum():
            raise ValueError("the states of a hybrid's own layers are those after all tokens of a row")
        with buffers.lock:
            if buffers.batch == 1 and np.array_equal(columns, np.arange(len(columns))):
                return BufferedPast(past.lease, mask, {n: copy_tensor(value) for n, value in past.memory.items()})
            return self._place(select_row(buffers.cache | past.memory, row, self._columns(past, row, columns)), mask)

    def _columns(self, past: BufferedPast, row: int, columns: NDArray[Any]) -> NDArray[Any]:
        """Return the places in the buffers of the keys and values of the tokens at `columns` of the mask."""
        if not self.interface.packed:
            return columns
        mask = past.mask[row]
        places: NDArray[Any] = (mask.cumsum() - 1)[columns][mask[columns] > 0]
        return places

    def join(self, pasts: Sequence[BufferedPast]) -> BufferedPast:
        """See `Graph.join`."""
        if len(pasts) == 1:
            return pasts[0]
        rows: list[dict[str, NDArray[Any]]] = []
        for past in pasts:
            with past.lease.buffers.lock:
                cache = {
                    n: to_numpy(value)[:, :, : past.length].copy() for n, value in past.lease.buffers.cache.items()
                }
                rows.append(cache | {name: to_numpy(value).copy() for name, value in past.memory.items()})
        length = max(past.length for past in pasts)
        mask = np.concatenate([np.pad(past.mask, ((0, 0), (length - past.length, 0))) for past in pasts])
        return self._place(join_rows(rows, behind=self.interface.packed), mask)

    def _call(self, feeds: dict[str, NDArray[Any]], past: BufferedPast) -> tuple[NDArray[Any], BufferedPast]:
        """Call the graph once. The mask in `feeds` covers the tokens of this call."""
        tokens = feeds[contract.INPUT_IDS].shape[1]
        past = self._exclusive(past, tokens)
        mask = np.concatenate([past.mask, feeds[contract.ATTENTION_MASK]], axis=1)
        if self.max_length:  # later columns are unused
            whole = np.pad(mask, ((0, 0), (0, self.max_length - mask.shape[1])))
            feeds = feeds | {contract.ATTENTION_MASK: whole, contract.PAST_LENGTH: np.array([past.length], np.int64)}
        else:
            feeds = feeds | {contract.ATTENTION_MASK: mask}
        arrays = {name: np.ascontiguousarray(feeds[name]) for name in self.input_names}
        with past.lease.buffers.lock:
            bound = tokens == 1 and past.memory.keys() == set(self.memory_names)  # and no initial states
            logits, after = (self._decode if bound else self._prefill)(arrays, past)
        after.mask = mask
        if not np.isfinite(logits).all():
            past.lease.spoil()  # NaN in these buffers would spread to the next conversation
        return logits, after

    def _exclusive(self, past: BufferedPast, tokens: int) -> BufferedPast:
        """Reserve `tokens` columns after `past`, and return it.

        If these columns are in use or there is no room, return a copy in other buffers.
        """
        lease = past.lease
        with lease.buffers.lock:
            if lease.columns_used == past.length and past.length + tokens <= lease.buffers.room:
                lease.columns_used += tokens
                return past
            other = self._lease(lease.buffers.batch, past.length + tokens)
            for name, value in lease.buffers.cache.items():
                if other.buffers.room == lease.buffers.room:
                    other.buffers.cache[name].update_inplace(value)
                else:
                    other.buffers.cache[name].update_inplace(
                        self._pad_columns(to_numpy(value)[:, :, : past.length], other)
                    )
            other.columns_used = past.length + tokens
            return BufferedPast(other, past.mask, {name: copy_tensor(value) for name, value in past.memory.items()})

    def _prefill(self, arrays: dict[str, NDArray[Any]], past: BufferedPast) -> tuple[NDArray[Any], BufferedPast]:
        cache = past.lease.buffers.cache
        logits, carried = self._run(arrays, cache | past.memory, cache, self.run_options(NOT_RECORDED))
        return logits, BufferedPast(past.lease, past.mask, {name: carried[name] for name in self.memory_names})

    def _decode(self, arrays: dict[str, NDArray[Any]], past: BufferedPast) -> tuple[NDArray[Any], BufferedPast]:
        buffers = past.lease.buffers
        source = buffers.slot_of(past)
        buffers.vacate(1 - source)
        binding = buffers.bindings[source]
        for name, array in arrays.items():
            if name == self.growing:
                binding.bind_cpu_input(name, array)
            else:
                buffers.inputs[name].update_inplace(array)
        self.run_bound(binding, buffers.options[source])
        after = BufferedPast(past.lease, past.mask, {})
        buffers.enter(1 - source, after)
        return to_numpy(buffers.logits).copy(), after

    def _lease(self, batch: int, columns: int) -> BufferLease:
        """Take free buffers or allocate new ones with at least `columns` columns; twice as many if they can grow."""
        if not self.max_length:
            room = max(FIRST_ROOM, 2 * columns)
            if self.interface.room is not None:
                room = max(columns, min(room, self.interface.room))
            return BufferLease(Buffers(self, batch, room), None)
        idle = self._idle.setdefault(batch, [])
        try:
            buffers = idle.pop()
        except IndexError:
            buffers = Buffers(self, batch, self.max_length)
        return BufferLease(buffers, idle)

    def _place(self, arrays: Mapping[str, NDArray[Any]], mask: NDArray[Any]) -> BufferedPast:
        """Return a past in its own buffers, from carried tensors whose keys and values have at most as many columns."""
        lease = self._lease(*mask.shape)
        lease.columns_used = mask.shape[1]
        for name, buffer in lease.buffers.cache.items():
            buffer.update_inplace(self._pad_columns(arrays[name], lease))
        return BufferedPast(lease, mask, self._on_device({name: arrays[name] for name in self.memory_names}))

    def _pad_columns(self, array: NDArray[Any], lease: BufferLease) -> OrtValue:
        """Return keys or values, padded to as many columns as the buffers have."""
        whole = np.pad(array, ((0, 0), (0, 0), (0, lease.buffers.room - array.shape[2]), (0, 0)))
        return to_device(whole, self.interface.dtype, self.device)

    def _check_thread(self) -> None:
        """Check that the call comes from the same thread as the first one, if CUDA graphs are on.

        Raises:
            ExportError: the call comes from another thread.
        """
        thread = threading.get_ident()
        self._thread = self._thread or thread
        if self._cuda_graph and self._thread != thread:
            raise _cuda_graph_error("ONNX Runtime keeps them for one thread.", "Make all calls from the same one.")


def open_graph(
    folder: str | Path,
    interface: Interface,
    provider: str = "cpu",
    threads: int | None = None,
    map_weights: bool = False,
    cuda_graph: bool = False,
) -> Graph | BufferedGraph:
    """Open the graph in `folder`, with the class that its interface needs.

    Raises:
        ExportError: the graph cannot be loaded with these options; see `Graph` and `BufferedGraph`.
    """
    if cuda_graph and not interface.max_length:
        raise _cuda_graph_error("Its keys and values grow with the text.", "Export it with --max-length.")
    if interface.max_length or interface.packed:
        return BufferedGraph(folder, interface, provider, threads, map_weights, cuda_graph)
    kind = RowsGraph if interface.row_by_row else Graph
    return kind(folder, interface, provider, threads, map_weights)


def _cuda_graph_error(why: str, next: str) -> ExportError:
    return ExportError("This graph cannot run as a CUDA graph.", why, next)

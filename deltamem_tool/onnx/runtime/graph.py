"""Load a graph in ONNX Runtime, check it, and run it with cache and memory staying on its device between calls."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnxruntime import OrtValue

from deltamem_tool.errors import ConfigError, ExportError, first_line
from deltamem_tool.io.cores import MAX_THREADS, default_threads
from deltamem_tool.onnx import contract
from deltamem_tool.onnx.contract import Interface
from deltamem_tool.onnx.runtime.ortvalue import ELEMENT_TYPES, to_device, to_numpy
from deltamem_tool.onnx.runtime.providers import OPTIONS, check_provider, execution_providers
from deltamem_tool.onnx.runtime.validate import check_graph_file

_THREADS_VARIABLE = "ORT_INTRA_OP_NUM_THREADS"
Past = dict[str, OrtValue]  # KV cache, states and open segments, by input name; never changed
_TYPES = {
    "tensor(int64)": contract.INT64,
    "tensor(bool)": contract.BOOL,
    "tensor(float)": contract.FLOAT32,
    "tensor(float16)": contract.FLOAT16,
    "tensor(bfloat16)": contract.BFLOAT16,
}


class LoadedGraph:
    """`model.onnx` in an ONNX Runtime session, checked against its interface: the base of `Graph` and `BufferedGraph`.

    Args:
        folder: folder with the graph and its weights.
        interface: inputs and outputs that the graph must have.
        provider: execution provider, "cpu" or "cuda".
        threads: threads per call; by default `ORT_INTRA_OP_NUM_THREADS`, `OMP_NUM_THREADS`, or the number of cores
            that this process may use.
        map_weights: memory-map the weights from their file instead of having ONNX Runtime repack them for the CPU. The
            graph then loads in a fraction of a second, and the weights need no memory of their own. A prompt took 1.6
            times as long; answers took no longer.
        provider_options: further options of ONNX Runtime for the provider, besides `providers.OPTIONS`.

    Raises:
        ExportError: the graph cannot be loaded or differs from `interface`, or the provider is not available.
    """

    def __init__(
        self,
        folder: str | Path,
        interface: Interface,
        provider: str = "cpu",
        threads: int | None = None,
        map_weights: bool = False,
        provider_options: Mapping[str, str] | None = None,
    ) -> None:
        self.interface = interface
        check_graph_file(Path(folder))
        first, *others = execution_providers(provider)
        providers = [(first, {**OPTIONS[provider], **(provider_options or {})}), *others]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = _threads(threads)
        # Lengths change from call to call. A memory plan for one length is of no use for the next, and costs several
        # percent of a decode step.
        options.enable_mem_pattern = bool(interface.max_length)
        if interface.defaults():
            options.log_severity_level = 3  # otherwise it logs, for every initial state, that it has a default
        if map_weights:
            options.add_session_config_entry("session.disable_prepacking", "1")
        try:
            self._session = onnxruntime.InferenceSession(
                str(Path(folder) / contract.MODEL_FILE), options, providers=providers
            )
        except Exception as error:  # onnxruntime's exceptions have no common base class
            raise ExportError(
                "ONNX Runtime cannot load this graph.", f"{first_line(error)}.", "Export the model again."
            ) from error
        check_provider(provider, self._session.get_providers())
        self._session.disable_fallback()
        interface.check_graph(
            _signature(self._session.get_inputs()),
            _signature(self._session.get_outputs()),
            _signature(self._session.get_overridable_initializers()),
        )
        self.device = provider
        self.output_names = list(interface.outputs())

    def memory_values(
        self, batch: int, states: Mapping[int, NDArray[Any]] | None, segments: Mapping[int, NDArray[Any]] | None
    ) -> Past:
        """Return the given states `[B, H, R, R]` and open segments `[B, W]` (by layer), or zeros, by input name."""
        shapes, width = self.interface.state_shapes, self.interface.segment
        states = states or {i: np.zeros((batch, *shape), np.float32) for i, shape in shapes.items()}
        segments = segments or {i: np.zeros((batch, width), np.float32) for i in shapes}
        parts = {contract.STATE: states, **({contract.SEGMENT: segments} if width else {})}
        return self._on_device(
            {
                contract.carried_name(contract.PAST, i, part): array
                for part, arrays in parts.items()
                for i, array in arrays.items()
            }
        )

    def initial_values(self, batch: int, states: Mapping[int, NDArray[Any]] | None) -> Past:
        """Return the further inputs of a graph for onnxruntime-genai; `states` are one row, for the whole batch."""
        values: Past = {}
        for i in self.interface.state_shapes if self.interface.genai else ():
            name = contract.carried_name(contract.PAST, i, contract.CONV)
            values[name] = to_device(np.zeros((batch, 1, 1), np.float32), contract.FLOAT32, self.device)
            if states is not None:  # otherwise the graph uses its default
                name = contract.carried_name(contract.INITIAL, i, contract.STATE)
                values[name] = to_device(states[i], contract.FLOAT32, self.device)
        return values

    def base_values(self, batch: int) -> Past:
        """Return zeros, the initial states of the base model, by input name."""
        sizes = self.interface.base_states
        return self._on_device({name: np.zeros((batch, *of_row), np.float32) for name, of_row in sizes.items()})

    def states(self, past: Any) -> dict[int, NDArray[Any]]:
        """Return a copy of the states in `past`: float32 `[B, H, R, R]` by layer."""
        return self.memory_part(past, contract.STATE)

    def segments(self, past: Any) -> dict[int, NDArray[Any]]:
        """Return a copy of the open segments in `past`: float32 `[B, W]` by layer; empty if every token writes."""
        return self.memory_part(past, contract.SEGMENT) if self.interface.segment else {}

    def memory_part(self, past: Any, part: str) -> dict[int, NDArray[Any]]:
        """Return a copy of one part of the memory in `past`, `contract.STATE` or `contract.SEGMENT`, by layer."""
        names = {i: contract.carried_name(contract.PAST, i, part) for i in self.interface.state_shapes}
        return {i: to_numpy(past[name]).copy() for i, name in names.items()}

    def _run(
        self,
        arrays: Mapping[str, NDArray[Any]],
        past: Mapping[str, OrtValue],
        buffers: Mapping[str, OrtValue] | None = None,
        options: onnxruntime.RunOptions | None = None,
    ) -> tuple[NDArray[Any], Past]:
        """Call the graph. `arrays` and logits are copied between host and device; carried tensors stay on the device.

        Args:
            arrays: inputs by name.
            past: the other inputs by name.
            buffers: tensors that outputs are written to, by the name of the input that takes them in the next call;
                other outputs are new tensors.
            options: run options.

        Returns:
            The logits and the next past.
        """
        binding = self._session.io_binding()
        for name, array in arrays.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        for name, value in past.items():
            binding.bind_ortvalue_input(name, value)
        for name in self.output_names:
            buffer = (buffers or {}).get(contract.past_name(name))
            if buffer is not None:
                binding.bind_ortvalue_output(name, buffer)
            else:
                binding.bind_output(name, "cpu" if name == contract.LOGITS_OUTPUT else self.device)
        self._session.run_with_iobinding(binding, options)
        logits, *present = binding.get_outputs()
        names = map(contract.past_name, self.output_names[1:])
        return logits.numpy(), dict(zip(names, present, strict=True))

    def _on_device(self, arrays: Mapping[str, NDArray[Any]]) -> Past:
        """Copy carried tensors, by input name, to the device."""
        types = {True: self.interface.dtype, False: contract.FLOAT32}
        return {name: to_device(array, types[is_cache(name)], self.device) for name, array in arrays.items()}


class Graph(LoadedGraph):
    """A graph whose keys and values grow: every call returns new ones and leaves the old ones unchanged."""

    def empty_past(
        self,
        batch: int,
        states: Mapping[int, NDArray[Any]] | None = None,
        segments: Mapping[int, NDArray[Any]] | None = None,
    ) -> Past:
        """Return a past without tokens, with the given states `[B, H, R, R]` and open segments `[B, W]`, or zeros."""
        past: Past = {}
        for i, layer in enumerate(self.interface.layers):
            for part, (heads, width) in layer.cache.items():
                name = contract.carried_name(contract.PAST, i, part)
                element = ELEMENT_TYPES[self.interface.dtype]
                past[name] = OrtValue.ortvalue_from_shape_and_type([batch, heads, 0, width], element, self.device)
        initial = self.initial_values(batch, states)
        past |= self.base_values(batch)
        return {**past, **initial, **self.memory_values(batch, None if initial else states, segments)}

    def with_memory(self, past: Past, states: Mapping[int, NDArray[Any]], segments: Mapping[int, NDArray[Any]]) -> Past:
        """Return `past` with other states `[B, H, R, R]` and open segments `[B, W]` by layer."""
        return {**past, **self.memory_values(len(next(iter(states.values()))), states, segments)}

    def step(
        self,
        input_ids: NDArray[Any],
        attention_mask: NDArray[Any],
        write_mask: NDArray[Any],
        past: Past,
        segment_end: NDArray[Any] | None = None,
    ) -> tuple[NDArray[Any], Past]:
        """Call the graph once. Carried tensors stay on the device; only tokens, masks and logits are copied.

        Args:
            input_ids: int64 `[B, T]`.
            attention_mask: int64 `[B, P + T]`, 0 at padding.
            write_mask: bool `[B, T]`, tokens that write; padding never does.
            past: from `empty_past` or the previous call. It is not changed.
            segment_end: bool `[B, T]`, tokens that end a segment; None if the graph has no segments.

        Returns:
            Logits `[B, 1, V]` (`[B, T, V]` in a graph for all positions) and the next past.
        """
        arrays = {
            contract.INPUT_IDS: input_ids,
            contract.ATTENTION_MASK: attention_mask,
            **({} if self.interface.genai else {contract.WRITE_MASK: write_mask}),  # with genai, every token writes
            **({} if segment_end is None else {contract.SEGMENT_END: segment_end}),
        }
        return self._run(arrays, past)

    def size(self, past: Past) -> int:
        """Return the size of `past` in bytes."""
        return sum(value.tensor_size_in_bytes() for value in past.values())

    def take(self, past: Past, row: int, columns: NDArray[Any]) -> Past:
        """Return one row `[1, ...]` of `past`, with only the tokens at the indices `columns`."""
        return self._on_device(select_row(past, row, columns))

    def join(self, pasts: Sequence[Past]) -> Past:
        """Join the rows of all `pasts` to one batch. Shorter ones are padded with zeros on the left; mask them."""
        if len(pasts) == 1:
            return pasts[0]
        return self._on_device(join_rows([{name: to_numpy(value) for name, value in past.items()} for past in pasts]))


def select_row(values: Mapping[str, OrtValue], row: int, columns: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """Return one row `[1, ...]` of carried tensors, with only the tokens at the indices `columns`."""
    arrays = {name: to_numpy(value)[row : row + 1] for name, value in values.items()}
    return {name: array[:, :, columns] if is_cache(name) else array for name, array in arrays.items()}


def join_rows(pasts: Sequence[Mapping[str, NDArray[Any]]], behind: bool = False) -> dict[str, NDArray[Any]]:
    """Join the rows of all `pasts` to one batch, padding shorter keys and values with zeros on the left or `behind`."""
    joined = {}
    for name in pasts[0]:
        arrays = [past[name] for past in pasts]
        if is_cache(name):
            length = max(array.shape[2] for array in arrays)
            missing = [length - array.shape[2] for array in arrays]
            pads = [(0, more) if behind else (more, 0) for more in missing]
            arrays = [np.pad(a, ((0, 0), (0, 0), pad, (0, 0))) for a, pad in zip(arrays, pads, strict=True)]
        joined[name] = np.concatenate(arrays)
    return joined


def _threads(chosen: int | None) -> int:
    """Return the number of threads per call: the chosen one, that of ONNX Runtime's variable, or PyTorch's.

    Raises:
        ConfigError: the number is not valid.
    """
    variable = os.environ.get(_THREADS_VARIABLE)
    number = str(chosen or variable or default_threads())
    if not number.isdecimal() or int(number) > MAX_THREADS:
        where = "" if chosen or not variable else f" It comes from the environment variable {_THREADS_VARIABLE}."
        raise ConfigError(
            f"Invalid number of threads: {number}.",
            f"It must be a whole number up to {MAX_THREADS}.{where}",
            "Leave it out to use all available cores.",
        )
    return int(number)  # 0 means the number of cores of the machine


def is_cache(name: str) -> bool:
    """Return whether a carried tensor has a column for every token, like keys and values."""
    return name.rpartition(".")[2] in contract.CACHE


def _signature(values: Sequence[Any]) -> dict[str, tuple[str, list[Any]]]:
    return {value.name: (_TYPES.get(value.type, value.type), list(value.shape)) for value in values}

"""Build a base model's graph with onnxruntime-genai's model builder, and run it as onnxruntime-genai does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from common import Command, watched
from numpy.typing import NDArray
from onnxruntime import OrtValue

from deltamem_tool.onnx.contract import FLOAT16, FLOAT32, GENAI_CONFIG_FILE, MODEL_FILE
from deltamem_tool.onnx.runtime.ortvalue import ELEMENT_TYPES, to_device, to_numpy
from deltamem_tool.onnx.runtime.providers import OPTIONS, check_provider, execution_providers

PRECISIONS = {FLOAT32: "fp32", FLOAT16: "fp16", "int4": "int4"}  # our names, and those of the builder
_TYPES = {"tensor(float)": FLOAT32, "tensor(float16)": FLOAT16}
_RECORDED, _NOT_RECORDED = "1", "-1"  # ONNX Runtime's gpu_graph_id


def build(checkpoint: Path, out: Path, precision: str, options: list[str], provider: str = "cpu") -> Command:
    """Write the graph of `checkpoint` to `out`. `options` are options of the builder, such as "block_size=32"."""
    extra = ["--extra_options", *options] if options else []
    arguments = ["-i", checkpoint, "-o", out, "-p", PRECISIONS[precision], "-e", provider, "-c", out / "cache"]
    return watched("-m", "onnxruntime_genai.models.builder", *arguments, *extra)


class BuilderSide:
    """A graph of the builder: a `deltamem_tool.bench.sides.Side` for one conversation at a time.

    Keys and values are in buffers of a fixed length, which are inputs and outputs at the same time, as in
    onnxruntime-genai.

    Args:
        folder: folder in which the builder wrote the graph.
        length: number of tokens that fit into the buffers.
        threads: threads per call on a CPU; 0 for the number of cores.
        provider: "cpu" or "cuda".
        fixed_steps: make steps of one token always read and write the same addresses. On CUDA, they are then recorded
            as a CUDA graph and replayed.
    """

    def __init__(
        self, folder: Path, length: int, threads: int = 0, provider: str = "cpu", fixed_steps: bool = False
    ) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        first, *others = execution_providers(provider)
        self._recorded = fixed_steps and provider == "cuda"
        own = OPTIONS[provider] | ({"enable_cuda_graph": "1"} if self._recorded else {})
        self._session = onnxruntime.InferenceSession(folder / MODEL_FILE, options, providers=[(first, own), *others])
        check_provider(provider, self._session.get_providers())
        self._device, self._length, self._fixed_steps = provider, length, fixed_steps
        values = {value.name: value for value in (*self._session.get_inputs(), *self._session.get_outputs())}
        _, self._positions, self.vocab_size = values["logits"].shape  # one position with the option prune_lm_head
        self._logits_type = ELEMENT_TYPES[_TYPES[values["logits"].type]]
        decoder = json.loads((folder / GENAI_CONFIG_FILE).read_text())["model"]["decoder"]
        size = (1, decoder["num_key_value_heads"], length, decoder["head_size"])
        self._buffers: list[tuple[str, str, OrtValue]] = []  # names as input and as output
        for layer in range(decoder["num_hidden_layers"]):
            for part in ("key", "value"):
                name = decoder["inputs"][f"past_{part}_names"] % layer
                dtype = _TYPES[values[name].type]
                buffer = to_device(np.zeros(size, dtype), dtype, provider)
                self._buffers.append((name, decoder["outputs"][f"present_{part}_names"] % layer, buffer))
        self._binding, self._step_binding = self._bound(), self._bound()
        self._step = self._values(np.zeros((1, 1), np.int64), np.zeros((1, length), np.int64))
        self._bind(self._step_binding, *self._step)

    def call(self, ids: NDArray[Any], past: int | None = None) -> tuple[NDArray[Any], int]:
        """Feed tokens, int64 `[1, T]`, after `past` others. Return the last logits `[1, V]` and the new past."""
        length = (past or 0) + ids.shape[1]
        mask, options = np.ones((1, length), np.int64), onnxruntime.RunOptions()
        fixed = self._fixed_steps and ids.shape[1] == 1
        if self._recorded:
            options.add_run_config_entry("gpu_graph_id", _RECORDED if fixed else _NOT_RECORDED)
        if fixed:
            binding, (own_ids, own_mask, logits) = self._step_binding, self._step
            own_ids.update_inplace(ids)
            own_mask.update_inplace(np.pad(mask, ((0, 0), (0, self._length - length))))
        else:
            binding, (own_ids, own_mask, logits) = self._binding, self._values(ids, mask)
            self._bind(binding, own_ids, own_mask, logits)
        self._session.run_with_iobinding(binding, options)
        return to_numpy(logits)[:, -1], length

    def choose(self, logits: NDArray[Any]) -> NDArray[np.int64]:
        """Return the most likely token, int64 `[1, 1]`."""
        return np.asarray(logits.argmax(-1)[:, None], np.int64)

    def _bound(self) -> Any:
        """Return a binding of keys and values to their buffers."""
        binding = self._session.io_binding()
        for past, present, buffer in self._buffers:
            binding.bind_ortvalue_input(past, buffer)
            binding.bind_ortvalue_output(present, buffer)
        return binding

    def _values(self, ids: NDArray[Any], mask: NDArray[Any]) -> tuple[OrtValue, OrtValue, OrtValue]:
        """Return ids, mask and a buffer for the logits, on the device."""
        positions = 1 if self._positions == 1 else ids.shape[1]
        shape = [1, positions, self.vocab_size]
        logits = OrtValue.ortvalue_from_shape_and_type(shape, self._logits_type, self._device)
        return to_device(ids, "int64", self._device), to_device(mask, "int64", self._device), logits

    @staticmethod
    def _bind(binding: Any, ids: OrtValue, mask: OrtValue, logits: OrtValue) -> None:
        binding.bind_ortvalue_input("input_ids", ids)
        binding.bind_ortvalue_input("attention_mask", mask)
        binding.bind_ortvalue_output("logits", logits)

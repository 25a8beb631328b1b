"""A base model's graph without a memory, as onnxruntime-genai's model builder writes it, and how its users run it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from common import Command, watched
from numpy.typing import NDArray
from onnxruntime import OrtValue

from deltamem_tool.onnx.contract import GENAI_CONFIG_FILE, MODEL_FILE

PRECISIONS = {"float32": "fp32", "int4": "int4"}  # the builder's names of ours


def build(checkpoint: Path, out: Path, precision: str, options: list[str]) -> Command:
    """Write the graph of `checkpoint` for CPUs into `out`; `options` are the builder's own, such as "block_size=32"."""
    extra = ["--extra_options", *options] if options else []
    arguments = ["-i", checkpoint, "-o", out, "-p", PRECISIONS[precision], "-e", "cpu", "-c", out / "cache"]
    return watched("-m", "onnxruntime_genai.models.builder", *arguments, *extra)


class BuilderSide:
    """A graph of the builder: a `deltamem_tool.bench.sides.Side` for one conversation at a time.

    Keys and values are in buffers of a fixed length that are input and output at once, as in onnxruntime-genai.

    Args:
        folder: where the builder wrote the graph.
        length: tokens that the buffers have room for.
        threads: of a call.
    """

    def __init__(self, folder: Path, length: int, threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self._session = onnxruntime.InferenceSession(folder / MODEL_FILE, options, providers=["CPUExecutionProvider"])
        self._binding = self._session.io_binding()
        shapes = {value.name: value.shape for value in (*self._session.get_inputs(), *self._session.get_outputs())}
        _, self._positions, self.vocab_size = shapes["logits"]
        decoder = json.loads((folder / GENAI_CONFIG_FILE).read_text())["model"]["decoder"]
        size = [1, decoder["num_key_value_heads"], length, decoder["head_size"]]
        for layer in range(decoder["num_hidden_layers"]):
            for past, present in ("past_key_names", "present_key_names"), ("past_value_names", "present_value_names"):
                buffer = OrtValue.ortvalue_from_numpy(np.zeros(size, np.float32))
                self._binding.bind_ortvalue_input(decoder["inputs"][past] % layer, buffer)
                self._binding.bind_ortvalue_output(decoder["outputs"][present] % layer, buffer)

    def call(self, ids: NDArray[Any], past: int | None = None) -> tuple[NDArray[Any], int]:
        """Feed tokens, int64 `[1, T]`, after `past` others. Returns the last one's logits `[1, V]` and the new past."""
        tokens, length = ids.shape[1], (past or 0) + ids.shape[1]
        positions = 1 if self._positions == 1 else tokens  # 1 with the builder's option prune_lm_head
        logits = OrtValue.ortvalue_from_shape_and_type([1, positions, self.vocab_size], np.float32)
        self._binding.bind_cpu_input("input_ids", ids)
        self._binding.bind_cpu_input("attention_mask", np.ones((1, length), np.int64))
        self._binding.bind_ortvalue_output("logits", logits)
        self._session.run_with_iobinding(self._binding)
        return logits.numpy()[:, -1], length

    def choose(self, logits: NDArray[Any]) -> NDArray[np.int64]:
        """Return the likeliest tokens, int64 `[1, 1]`."""
        return np.asarray(logits.argmax(-1)[:, None], np.int64)

"""An exported graph in another runtime, usable like a `Graph`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltamem_tool.onnx import contract
from deltamem_tool.onnx.contract import Interface
from deltamem_tool.onnx.runtime.graph import Graph, Past
from deltamem_tool.onnx.runtime.ortvalue import to_numpy

Run = Callable[[dict[str, NDArray[Any]]], dict[str, NDArray[Any]]]  # inputs by name to outputs by name


class GraphRunner(Graph):
    """A graph that `run` computes, without a session or checks. Keys and values grow, even packed ones."""

    def __init__(self, run: Run, interface: Interface) -> None:
        self.run, self.interface, self.device = run, interface, "cpu"

    def step(
        self,
        input_ids: NDArray[Any],
        attention_mask: NDArray[Any],
        write_mask: NDArray[Any],
        past: Past,
        segment_end: NDArray[Any] | None = None,
    ) -> tuple[NDArray[Any], Past]:
        """Like `Graph.step`, but runs row by row what the attention with packed keys and values does not support."""
        (rows, tokens), columns = input_ids.shape, attention_mask.shape[1]
        if not self.interface.packed or rows == 1 or tokens == 1 or tokens == columns:
            return super().step(input_ids, attention_mask, write_mask, past, segment_end)
        results = []
        for row in (slice(row, row + 1) for row in range(rows)):
            alone = self._on_device({name: to_numpy(value)[row] for name, value in past.items()})
            end = None if segment_end is None else segment_end[row]
            results.append(super().step(input_ids[row], attention_mask[row], write_mask[row], alone, end))
        joined = {name: np.concatenate([to_numpy(after[name]) for _, after in results]) for name in past}
        return np.concatenate([logits for logits, _ in results]), self._on_device(joined)

    def _run(
        self, arrays: Mapping[str, NDArray[Any]], past: Mapping[str, Any], *rest: object
    ) -> tuple[NDArray[Any], Past]:
        outputs = self.run({**arrays, **{name: to_numpy(value) for name, value in past.items()}})
        logits = outputs.pop(contract.LOGITS_OUTPUT)
        return logits, self._on_device({contract.past_name(name): value for name, value in outputs.items()})

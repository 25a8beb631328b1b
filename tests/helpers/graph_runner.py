"""An exported graph in another runtime than ours, for whatever takes a `Graph`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from numpy.typing import NDArray

from deltamem_tool.onnx import contract
from deltamem_tool.onnx.contract import Interface
from deltamem_tool.onnx.runtime.graph import Graph, Past
from deltamem_tool.onnx.runtime.ortvalue import on_host

Run = Callable[[dict[str, NDArray[Any]]], dict[str, NDArray[Any]]]  # inputs by name to outputs by name


class GraphRunner(Graph):
    """A graph that `run` runs: no session is loaded, and nothing is checked."""

    def __init__(self, run: Run, interface: Interface) -> None:
        self.run, self.interface, self.device = run, interface, "cpu"

    def _run(
        self, arrays: Mapping[str, NDArray[Any]], past: Mapping[str, Any], *rest: object
    ) -> tuple[NDArray[Any], Past]:
        outputs = self.run({**arrays, **{name: on_host(value) for name, value in past.items()}})
        logits = outputs.pop(contract.LOGITS_OUTPUT)
        return logits, self._on_device({contract.past_name(name): value for name, value in outputs.items()})

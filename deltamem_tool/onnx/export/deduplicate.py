"""Store constant matrices with repeated rows or columns without the repeats.

The matrices of a fused memory are half zeros, and repeat gates. ONNX Runtime assembles them once, when it loads the
graph (constant folding), so the graph that runs is the same.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from deltamem_tool.onnx.export.graph_edits import initializer

WORTH = 0.9  # maximum size relative to the original; smaller savings do not justify a node


def store_repeats_once(graph: onnx_ir.Graph, matrix: onnx_ir.Value) -> None:
    """Replace a constant `[rows, columns]` by a `Gather` of its distinct rows, its columns, or both, bit for bit.

    The constant stays as it is if little of it repeats.
    """
    assert matrix.const_value is not None
    array = matrix.const_value.numpy()
    found: list[tuple[int, NDArray[np.int64]]] = []  # the last axis comes first, as it is assembled first
    for axis in (0, 1):
        kept, index = _distinct(array, axis)
        if kept.size <= WORTH * array.size:
            array, found = kept, [(axis, index), *found]
    if not found:
        return
    value, nodes = initializer(graph, f"{matrix.name}_distinct", array), []
    for axis, index in found:
        places = initializer(graph, f"{matrix.name}_places_{axis}", index)
        nodes.append(onnx_ir.node("Gather", [value, places], attributes={"axis": axis}))
        value = nodes[-1].outputs[0]
    value.type, value.shape = matrix.type, matrix.shape
    graph.insert_before(graph[0], nodes)
    onnx_ir.convenience.replace_all_uses_with(matrix, value)


def _distinct(array: NDArray[Any], axis: int) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Return the distinct rows (axis 0) or columns (axis 1), in order of appearance, and the index of each original."""
    first: dict[bytes, int] = {}  # index by bytes, so that only bit-identical rows count as equal
    index = [first.setdefault(line.tobytes(), len(first)) for line in (array.T if axis else array)]
    places = np.array(index, np.int64)
    return np.take(array, np.unique(places, return_index=True)[1], axis), places

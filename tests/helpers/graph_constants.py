"""The constants of an exported graph, as they are after ONNX Runtime has loaded it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper


def constants(folder: Path) -> dict[str, np.ndarray]:
    """The initializers by name, and the rows and columns that other nodes gather from them."""
    graph = onnx.load(folder / "model.onnx").graph
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Gather" and set(node.input) <= arrays.keys():
            (axis,) = (helper.get_attribute_value(attribute) for attribute in node.attribute)
            arrays[node.output[0]] = np.take(*(arrays[name] for name in node.input), axis)
    return arrays


def columns(folder: Path) -> set[bytes]:
    """The columns of every float32 matrix."""
    matrices = [array for array in constants(folder).values() if array.dtype == np.float32 and array.ndim == 2]
    return {column.tobytes() for matrix in matrices for column in matrix.T}

"""Store constant matrices of a graph in blocks of 4 or 8 bits, and create the operators that read them.

`MatMulNBits` multiplies by a matrix, and `GatherBlockQuantized` looks up its rows. Both use the same layout, so a tied
embedding is a single set of constants. The values are those of ONNX Runtime's own quantiser.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from deltamem_tool.onnx.export.graph_edits import MICROSOFT, initializer
from deltamem_tool.onnx.manifest import Quantization

# This import configures the root logger, and so the messages of all libraries, unless it has a handler.
_handler = logging.NullHandler()
logging.getLogger().addHandler(_handler)
from onnxruntime.quantization.matmul_nbits_quantizer import (  # noqa: E402
    DefaultWeightOnlyQuantConfig,
    DefaultWeightOnlyQuantizer,
)

logging.getLogger().removeHandler(_handler)

# At this level, ONNX Runtime's CPU provider quantises activations to int8, in blocks of each row, and multiplies
# integers: for one token, two to ten times as fast as float32. Other providers compute in the type of the activations.
ACCURACY_LEVEL = 4


@dataclass(frozen=True)
class _Blocks:
    """A matrix `[out, in]` as initializers.

    Args:
        numbers: uint8 `[out, blocks, block bytes]`; with 4 bits, two per byte, the first one in the lower bits.
        scales: `[out, blocks]`, in the type of the matrix.
        zeros: uint8 `[out, blocks]`, packed like the numbers; None if all zero points are in the middle of the range.
    """

    numbers: onnx_ir.Value
    scales: onnx_ir.Value
    zeros: onnx_ir.Value | None

    @property
    def scaling(self) -> list[onnx_ir.Value]:
        return [self.scales] if self.zeros is None else [self.scales, self.zeros]


class QuantizedMatrices:
    """The quantised matrices of `graph`. Each is stored once, however many operators read it."""

    def __init__(self, graph: onnx_ir.Graph, quantization: Quantization) -> None:
        self._graph, self._quantization = graph, quantization
        self._blocks: dict[str, _Blocks] = {}  # by the name of the matrix

    def product(self, x: onnx_ir.Value, name: str, matrix: NDArray[Any]) -> onnx_ir.Node:
        """Return a node for x · `matrix` `[in, out]`. Equal matrices must have the same `name`."""
        blocks = self._blocks_of(name, matrix)
        attributes = {"K": matrix.shape[0], "N": matrix.shape[1], "bits": self._quantization.bits}
        attributes |= {"block_size": self._quantization.group_size, "accuracy_level": ACCURACY_LEVEL}
        inputs = [x, blocks.numbers, *blocks.scaling]
        return onnx_ir.node("MatMulNBits", inputs, attributes=attributes, domain=MICROSOFT)

    def lookup(self, indices: onnx_ir.Value, name: str, matrix: NDArray[Any]) -> list[onnx_ir.Node]:
        """Return nodes that look up the columns of `matrix` `[in, out]` at `indices` `[…]`; the last gives `[…, in]`.

        `in` must be a multiple of the group size.
        """
        blocks = self._blocks_of(name, matrix)
        shape = np.array([matrix.shape[1], -1], np.int64)
        rows = onnx_ir.node("Reshape", [blocks.numbers, initializer(self._graph, f"{name}_rows_shape", shape)])
        attributes = {"bits": self._quantization.bits, "block_size": self._quantization.group_size}
        attributes |= {"gather_axis": 0, "quantize_axis": 1}
        inputs = [rows.outputs[0], indices, *blocks.scaling]
        return [rows, onnx_ir.node("GatherBlockQuantized", inputs, attributes=attributes, domain=MICROSOFT)]

    def _blocks_of(self, name: str, matrix: NDArray[Any]) -> _Blocks:
        if name not in self._blocks:
            numbers, scales, zeros = quantize_columns(matrix, self._quantization)
            self._blocks[name] = _Blocks(
                initializer(self._graph, f"{name}_quantized", numbers),
                initializer(self._graph, f"{name}_scales", scales),
                None if zeros is None else initializer(self._graph, f"{name}_zero_points", zeros),
            )
        return self._blocks[name]


def quantize_columns(
    matrix: NDArray[Any], quantization: Quantization
) -> tuple[NDArray[np.uint8], NDArray[Any], NDArray[np.uint8] | None]:
    """Quantise the columns of `matrix` `[in, out]` in blocks with ONNX Runtime's own quantiser.

    Returns:
        Numbers, scales and zero points, as in `_Blocks`.
    """
    config = DefaultWeightOnlyQuantConfig(
        block_size=quantization.group_size, is_symmetric=quantization.symmetric, bits=quantization.bits
    )
    numbers, scales, zeros = DefaultWeightOnlyQuantizer(config).qbits_block_quant(np.ascontiguousarray(matrix))
    return numbers, scales, None if quantization.symmetric else zeros

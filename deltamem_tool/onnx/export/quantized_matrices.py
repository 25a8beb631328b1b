"""Constant matrices of a graph in blocks of 4 or 8 bits, and the operators that read them.

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

# Its import configures the root logger, for all messages of all libraries, unless that has a handler.
_handler = logging.NullHandler()
logging.getLogger().addHandler(_handler)
from onnxruntime.quantization.matmul_nbits_quantizer import (  # noqa: E402
    DefaultWeightOnlyQuantConfig,
    DefaultWeightOnlyQuantizer,
)

logging.getLogger().removeHandler(_handler)

# ONNX Runtime's CPU provider quantises activations to int8, each row by itself in blocks, and multiplies whole numbers,
# two to ten times as fast as float32 for one token. Others compute in the type of the activations.
ACCURACY_LEVEL = 4


@dataclass(frozen=True)
class _Blocks:
    """A matrix `[out, in]` as initializers.

    Args:
        numbers: uint8 `[out, blocks, block bytes]`; two of 4 bits a byte, the first one lowest.
        scales: `[out, blocks]`, in the type of the matrix.
        zeros: uint8 `[out, blocks]`, packed like the numbers; None where every zero is in the middle.
    """

    numbers: onnx_ir.Value
    scales: onnx_ir.Value
    zeros: onnx_ir.Value | None

    @property
    def scaling(self) -> list[onnx_ir.Value]:
        return [self.scales] if self.zeros is None else [self.scales, self.zeros]


class QuantizedMatrices:
    """The matrices of `graph` that have been quantised, each once, however many operators read it."""

    def __init__(self, graph: onnx_ir.Graph, quantization: Quantization) -> None:
        self._graph, self._quantization = graph, quantization
        self._blocks: dict[str, _Blocks] = {}  # by the name of the matrix

    def product(self, x: onnx_ir.Value, name: str, matrix: NDArray[Any]) -> onnx_ir.Node:
        """A node for x · `matrix` `[in, out]`; `name` is the same for the same matrix."""
        blocks = self._blocks_of(name, matrix)
        attributes = {"K": matrix.shape[0], "N": matrix.shape[1], "bits": self._quantization.bits}
        attributes |= {"block_size": self._quantization.group_size, "accuracy_level": ACCURACY_LEVEL}
        inputs = [x, blocks.numbers, *blocks.scaling]
        return onnx_ir.node("MatMulNBits", inputs, attributes=attributes, domain=MICROSOFT)

    def lookup(self, indices: onnx_ir.Value, name: str, matrix: NDArray[Any]) -> list[onnx_ir.Node]:
        """Nodes for the columns of `matrix` `[in, out]` at `indices` `[…]`; the last one gives them, `[…, in]`.

        `in` is a multiple of the group size: each block is whole.
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
            numbers, scales, zeros = quantized(matrix, self._quantization)
            self._blocks[name] = _Blocks(
                initializer(self._graph, f"{name}_quantized", numbers),
                initializer(self._graph, f"{name}_scales", scales),
                None if zeros is None else initializer(self._graph, f"{name}_zero_points", zeros),
            )
        return self._blocks[name]


def quantized(
    matrix: NDArray[Any], quantization: Quantization
) -> tuple[NDArray[np.uint8], NDArray[Any], NDArray[np.uint8] | None]:
    """Quantise `matrix` `[in, out]` as ONNX Runtime's own quantiser does, each column in blocks.

    Returns:
        Numbers, scales and zero points, as `_Blocks` has them.
    """
    config = DefaultWeightOnlyQuantConfig(
        block_size=quantization.group_size, is_symmetric=quantization.symmetric, bits=quantization.bits
    )
    numbers, scales, zeros = DefaultWeightOnlyQuantizer(config).qbits_block_quant(np.ascontiguousarray(matrix))
    return numbers, scales, None if quantization.symmetric else zeros

"""Store constant matrices of a graph in blocks of 4 or 8 bits, and create the operators that read them.

`MatMulNBits` multiplies by a matrix, and `GatherBlockQuantized` looks up its rows. Both use the same layout, so a tied
embedding is a single set of constants.

A symmetric block is s·q, with the values of ONNX Runtime's own quantiser. An asymmetric one is s·q + c, with any number
c. This is the format of GGUF's Q4_1, so the weights of such a base are kept. `MatMulNBits` can read these numbers as
floating zero points, but takes thirty times as long with them on a CPU (`benchmarks/onnx_offsets.py`). x · W is
computed as two products instead: x by s·q, and the sums of x over each block by c.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
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

# Bits of the embedding and the LM head. With 4 they lose most: see docs/export.md.
VOCABULARY_BITS = 8


@dataclass(frozen=True)
class _Blocks:
    """A matrix `[out, in]` as initializers.

    Args:
        numbers: uint8 `[out, blocks, block bytes]`; with 4 bits, two per byte, the first one in the lower bits. Half of
            their range, 8 or 128, stands for 0.
        scales: `[out, blocks]`, in the type of the matrix.
        offsets: float16 `[blocks, out]`, what is added to all weights of a block; None if symmetric.
    """

    numbers: onnx_ir.Value
    scales: onnx_ir.Value
    offsets: onnx_ir.Value | None


class QuantizedMatrices:
    """The quantised matrices of `graph`. Each is stored once, however many operators read it.

    Args:
        graph: the graph, to which their constants are added.
        quantization: bits, groups, and whether there are offsets.
        vocabulary: shapes `[in, out]` of the embeddings. Their matrices have `VOCABULARY_BITS`, and no offsets.
    """

    def __init__(
        self, graph: onnx_ir.Graph, quantization: Quantization, vocabulary: Collection[tuple[int, ...]]
    ) -> None:
        self._graph, self._quantization, self._vocabulary = graph, quantization, vocabulary
        self._blocks: dict[str, _Blocks] = {}  # by the name of the matrix
        self._sums: dict[onnx_ir.Value, onnx_ir.Value] = {}  # of each input of a product, over its groups
        self._members: dict[int, onnx_ir.Value] = {}  # by the length of the input

    def product(self, x: onnx_ir.Value, name: str, matrix: NDArray[Any]) -> list[onnx_ir.Node]:
        """Return nodes for x · `matrix` `[in, out]`; the last gives it. Equal matrices must have the same `name`.

        Products must be created in the order of the graph: several of the same `x` share a node of the first.
        """
        blocks, method = self._blocks_of(name, matrix), self._method_of(matrix)
        attributes = {"K": matrix.shape[0], "N": matrix.shape[1], "bits": method.bits}
        attributes |= {"block_size": method.group_size, "accuracy_level": ACCURACY_LEVEL}
        inputs = [x, blocks.numbers, blocks.scales]
        product = onnx_ir.node("MatMulNBits", inputs, attributes=attributes, domain=MICROSOFT)
        if blocks.offsets is None:
            return [product]
        # Sessions fold the cast when they load the graph.
        cast = onnx_ir.node("Cast", [blocks.offsets], attributes={"to": onnx_ir.DataType.from_numpy(matrix.dtype)})
        sums = []
        if x not in self._sums:
            sums = [onnx_ir.node("MatMul", [x, self._members_of(matrix)])]
            self._sums[x] = sums[0].outputs[0]
        shift = onnx_ir.node("MatMul", [self._sums[x], cast.outputs[0]])
        total = onnx_ir.node("Add", [product.outputs[0], shift.outputs[0]])
        return [product, *sums, cast, shift, total]

    def lookup(self, indices: onnx_ir.Value, name: str, matrix: NDArray[Any]) -> list[onnx_ir.Node]:
        """Return nodes that look up the columns of `matrix` `[in, out]` at `indices` `[…]`; the last gives `[…, in]`.

        `in` must be a multiple of the group size.
        """
        blocks, method = self._blocks_of(name, matrix), self._method_of(matrix)
        shape = np.array([matrix.shape[1], -1], np.int64)
        rows = onnx_ir.node("Reshape", [blocks.numbers, initializer(self._graph, f"{name}_rows_shape", shape)])
        attributes = {"bits": method.bits, "block_size": method.group_size, "gather_axis": 0, "quantize_axis": 1}
        inputs = [rows.outputs[0], indices, blocks.scales]
        return [rows, onnx_ir.node("GatherBlockQuantized", inputs, attributes=attributes, domain=MICROSOFT)]

    def _method_of(self, matrix: NDArray[Any]) -> Quantization:
        if matrix.shape not in self._vocabulary:
            return self._quantization
        return Quantization(VOCABULARY_BITS, self._quantization.group_size, symmetric=True)

    def _blocks_of(self, name: str, matrix: NDArray[Any]) -> _Blocks:
        if name not in self._blocks:
            numbers, scales, offsets = quantize_columns(matrix, self._method_of(matrix))
            self._blocks[name] = _Blocks(
                initializer(self._graph, f"{name}_quantized", numbers),
                initializer(self._graph, f"{name}_scales", scales),
                None if offsets is None else initializer(self._graph, f"{name}_offsets", offsets),
            )
        return self._blocks[name]

    def _members_of(self, matrix: NDArray[Any]) -> onnx_ir.Value:
        """The matrix `[in, blocks]` of ones and zeros that sums an input over the groups of `matrix`."""
        length, size = len(matrix), self._quantization.group_size
        if length not in self._members:
            members = np.repeat(np.eye(-(-length // size), dtype=matrix.dtype), size, axis=0)[:length]
            self._members[length] = initializer(self._graph, f"groups_of_{length}", members)
        return self._members[length]


def quantize_columns(
    matrix: NDArray[Any], quantization: Quantization
) -> tuple[NDArray[np.uint8], NDArray[Any], NDArray[np.float16] | None]:
    """Quantise the columns of `matrix` `[in, out]` in blocks.

    Returns:
        Numbers, scales and offsets, as in `_Blocks`.
    """
    bits, size = quantization.bits, quantization.group_size
    if quantization.symmetric:
        config = DefaultWeightOnlyQuantConfig(block_size=size, is_symmetric=True, bits=bits)
        numbers, scales, _ = DefaultWeightOnlyQuantizer(config).qbits_block_quant(np.ascontiguousarray(matrix))
        return numbers, scales, None
    padding = (0, -len(matrix) % size)
    blocks = np.pad(matrix.T.astype(np.float32), ((0, 0), padding), mode="edge").reshape(matrix.shape[1], -1, size)
    low = blocks.min(-1)
    scales = (blocks.max(-1) - low) / (2**bits - 1)
    steps = np.where(scales > 0, scales, 1)
    numbers = np.rint((blocks - low[..., None]) / steps[..., None]).astype(np.uint8)
    if bits == 4:
        numbers = numbers[..., ::2] | numbers[..., 1::2] << 4
    offsets = np.ascontiguousarray((low + scales * 2 ** (bits - 1)).T)
    return numbers, scales.astype(matrix.dtype), offsets.astype(np.float16)

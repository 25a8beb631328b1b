"""What a product `x W` with a constant matrix becomes in 8 and in 4 bits: nodes that ONNX Runtime has kernels for.

* `Int8`: `DynamicQuantizeLinear` of x, once for all products that read it, `MatMulInteger`, and both scales. ONNX
  Runtime puts them into one operator when it loads the graph.
* `Int4`: `MatMulNBits`.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import onnx_ir
from numpy.typing import NDArray

# Its import configures the root logger, for all messages of all libraries, unless that has a handler.
_handler = logging.NullHandler()
logging.getLogger().addHandler(_handler)
from onnxruntime.quantization.matmul_nbits_quantizer import (  # noqa: E402
    DefaultWeightOnlyQuantConfig,
    DefaultWeightOnlyQuantizer,
)

logging.getLogger().removeHandler(_handler)

BLOCK_SIZE = 32  # of int4: the smallest that all of ONNX Runtime's kernels take
# Of int4: ONNX Runtime's CPU provider quantises activations to int8, each row by itself in blocks, and multiplies whole
# numbers, two to three times as fast as float32. Others compute in the type of the activations.
ACCURACY_LEVEL = 4
INT8_MOST = 64  # of 127: products of 8 by 8 bits overflow the 16-bit sums of x86 processors without VNNI


class Int8:
    """Weights of 7 bits around zero, a scale for every output."""

    def __init__(self, graph: onnx_ir.Graph) -> None:
        self._graph = graph
        self._inputs: dict[onnx_ir.Value, onnx_ir.Node] = {}  # by what they quantise

    def product(self, before: onnx_ir.Node, x: onnx_ir.Value, weight: NDArray[Any], name: str) -> list[onnx_ir.Node]:
        """Nodes for x · `weight` `[in, out]`, which come where `before` is; the last one gives the product."""
        if x not in self._inputs:
            self._inputs[x] = onnx_ir.node("DynamicQuantizeLinear", [x], num_outputs=3)
            self._graph.insert_before(before, self._inputs[x])
        quantized, scale, zero = self._inputs[x].outputs
        numbers, scales = int8_of(weight)
        matrix = initializer(self._graph, f"{name}_weight", numbers)
        zeros = initializer(self._graph, f"{name}_zeros", np.zeros(len(scales), np.int8))
        whole = onnx_ir.node("MatMulInteger", [quantized, matrix, zero, zeros])
        cast = onnx_ir.node("Cast", whole.outputs, attributes={"to": onnx_ir.DataType.FLOAT})
        both = onnx_ir.node("Mul", [scale, initializer(self._graph, f"{name}_scales", scales)])
        return [whole, cast, both, onnx_ir.node("Mul", [cast.outputs[0], both.outputs[0]])]


class Int4:
    """Weights of 4 bits in blocks of the input dimension, each with a scale and a zero point."""

    def __init__(self, graph: onnx_ir.Graph) -> None:
        self._graph = graph

    def product(self, before: onnx_ir.Node, x: onnx_ir.Value, weight: NDArray[Any], name: str) -> list[onnx_ir.Node]:
        """As `Int8.product`."""
        parts = zip(("weight", "scales", "zeros"), int4_of(weight), strict=True)
        constants = [initializer(self._graph, f"{name}_{part}", array) for part, array in parts]
        attributes = {"K": weight.shape[0], "N": weight.shape[1], "bits": 4, "block_size": BLOCK_SIZE}
        attributes["accuracy_level"] = ACCURACY_LEVEL
        return [onnx_ir.node("MatMulNBits", [x, *constants], attributes=attributes, domain="com.microsoft")]


def int8_of(weight: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Whole numbers `[in, out]` and scales `[out]`, whose product is `weight` but for rounding."""
    scales = (np.abs(weight).max(axis=0) / INT8_MOST).astype(np.float32)
    scales[scales == 0] = 1
    return np.rint(weight / scales).clip(-INT8_MOST, INT8_MOST).astype(np.int8), scales


def int4_of(weight: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Quantise `weight` `[in, out]` as ONNX Runtime's own quantiser does.

    Returns:
        What `MatMulNBits` takes: numbers `[out, blocks, 16]`, two a byte; scales `[out, blocks]` in the type of
        `weight`; zero points `[out, ⌈blocks / 2⌉]`, two a byte.
    """
    config = DefaultWeightOnlyQuantConfig(block_size=BLOCK_SIZE, is_symmetric=False)
    numbers, scales, zeros = DefaultWeightOnlyQuantizer(config).qbits_block_quant(np.ascontiguousarray(weight))
    return numbers, scales, zeros


def initializer(graph: onnx_ir.Graph, name: str, array: NDArray[Any]) -> onnx_ir.Value:
    """Register a constant of the graph."""
    value = onnx_ir.Value(name=name, const_value=onnx_ir.tensor(np.ascontiguousarray(array), name=name))
    value.dtype, value.shape = onnx_ir.DataType.from_numpy(array.dtype), onnx_ir.Shape(array.shape)
    graph.register_initializer(value)
    return value

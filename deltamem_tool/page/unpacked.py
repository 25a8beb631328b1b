"""Convert a graph for WebAssembly, where ONNX Runtime has no product that reads weights of 4 or 8 bits.

There, `MatMulNBits` dequantises the weights to float32 in every call. With `DequantizeLinear` before a plain product,
ONNX Runtime does so once, when it loads the graph (with the session option `session.disable_quant_qdq`), and a token of
SmolLM2-135M takes 36 ms instead of 284. The weight file does not change: tensors of another type refer to the same
bytes. In memory, the weights are as large as in float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onnx import NodeProto, TensorProto

MAX_UNPACKED_BYTES = 3 * 2**29  # of float32, beside which WebAssembly's 4 GiB hold keys, values and the packed weights
OPSET = 21  # the first whose DequantizeLinear has groups
_ZERO = {4: b"\x88", 8: b"\x80"}  # the middle of the range, by bits: two of 4 in a byte


def write_unpacked(source: Path, out: Path) -> bool:
    """Write the unpacked graph to `out` and return True, or return False if nothing or too much is to be unpacked.

    Args:
        source: file of the graph, with its weights beside it.
        out: file to write.
    """
    import onnx

    model = onnx.load(source, load_external_data=False)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes: list[NodeProto] = []
    added: list[TensorProto] = []
    unpacked = 0
    for node in model.graph.node:
        sizes = _sizes(node, weights)
        if sizes is None:
            nodes.append(node)
            continue
        unpacked += math.prod(sizes[:2]) * 4
        instead, tensors = _plain_product(node, weights, *sizes)
        nodes += instead
        added += tensors
    if not 0 < unpacked <= MAX_UNPACKED_BYTES:
        return False
    used = {name for node in nodes for name in node.input}
    initializers = [tensor for tensor in model.graph.initializer if tensor.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend([*initializers, *added])
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    for opset in model.opset_import:
        if opset.domain in ("", "ai.onnx"):
            opset.version = max(opset.version, OPSET)
    onnx.save(model, out)
    return True


def _sizes(node: NodeProto, weights: dict[str, TensorProto]) -> tuple[int, int, int, int] | None:
    """N, K, group size and bits of a product that can be unpacked; None for any other node."""
    from onnx import TensorProto, helper

    if node.op_type != "MatMulNBits" or any(node.input[3:]):  # with zero points, or a bias
        return None
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    rows, columns, group, bits = (int(attributes[name]) for name in ("N", "K", "block_size", "bits"))
    packed, scales = (weights.get(name) for name in node.input[1:3])
    if bits not in _ZERO or columns % group or packed is None or scales is None:
        return None
    as_expected = (
        math.prod(packed.dims) == rows * columns * bits // 8
        and math.prod(scales.dims) == rows * columns // group
        and scales.data_type == TensorProto.FLOAT
    )
    return (rows, columns, group, bits) if as_expected else None


def _plain_product(
    node: NodeProto, weights: dict[str, TensorProto], rows: int, columns: int, group: int, bits: int
) -> tuple[Sequence[NodeProto], Sequence[TensorProto]]:
    from onnx import TensorProto, helper

    name = node.input[1]
    kind = TensorProto.UINT4 if bits == 4 else TensorProto.UINT8
    groups = [rows, columns // group]
    tensors = []
    for part, source, data_type, dims in (
        ("packed", name, kind, [rows, columns]),
        ("scales", node.input[2], TensorProto.FLOAT, groups),
    ):
        tensor = TensorProto()
        tensor.CopyFrom(weights[source])
        tensor.name, tensor.data_type = f"{name}.{part}", data_type
        del tensor.dims[:]
        tensor.dims.extend(dims)
        tensors.append(tensor)
    zeros = _ZERO[bits] * math.ceil(math.prod(groups) * bits / 8)
    tensors.append(TensorProto(name=f"{name}.zero", data_type=kind, dims=groups, raw_data=zeros))
    inputs = [tensor.name for tensor in tensors]
    nodes = [
        helper.make_node("DequantizeLinear", inputs, [f"{name}.unpacked"], axis=1, block_size=group),
        helper.make_node("Transpose", [f"{name}.unpacked"], [f"{name}.columns"], perm=[1, 0]),
        helper.make_node("MatMul", [node.input[0], f"{name}.columns"], list(node.output)),
    ]
    return nodes, tensors

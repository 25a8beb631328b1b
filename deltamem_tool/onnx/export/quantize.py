"""The base's weights of an exported graph in 8 or 4 bits. The memory's stay float32, bit by bit.

Quantised are the constant matrices `[in, out]` of the base's products (MatMul, Gemm). What stays as it is: the memory,
the embedding, the matrix that makes the logits, and whatever is no such product.

* int8: a scale for every output channel; activations are quantised as they come.
* int4: in blocks of the input dimension; a CPU quantises activations to int8 as they come, each token by itself.

What a product becomes is in `quantized_products`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
from numpy.typing import NDArray
from onnx_ir.passes import common

from deltamem_tool.errors import ExportError
from deltamem_tool.memory.adapter import DeltaMemAdapter
from deltamem_tool.onnx import contract
from deltamem_tool.onnx.export.fused_memory import FusedMemory
from deltamem_tool.onnx.export.quantized_products import Int4, Int8, initializer
from deltamem_tool.onnx.export.targets import INT8


def memory_weights(adapter: DeltaMemAdapter, fused: Mapping[int, FusedMemory]) -> list[NDArray[Any]]:
    """Every matrix of the memory as the graph holds it, float32 `[in, out]`; `fused`: what was traced in its place."""
    weights = chain.from_iterable(memory.matrices() for memory in fused.values()) if fused else adapter.parameters()
    return [weight.detach().cpu().numpy().T for weight in weights if weight.dim() == 2]


def quantize_graph(folder: Path, how: str, memory: Sequence[NDArray[Any]], vocab_size: int) -> int:
    """Quantise the graph in `folder`, in place; how many products that were.

    One matrix at a time: the others stay mapped from their file, and those that are done take what they take in it.

    Args:
        folder: holds `model.onnx` and its data; both are replaced.
        how: "int8" or "int4".
        memory: the memory's matrices, from `memory_weights`.
        vocab_size: V: a matrix `[in, V]` makes the logits.

    Raises:
        ExportError: the memory's weights are not found in the graph as they are, or there is nothing to quantise.
    """
    model = onnx_ir.load(folder / contract.MODEL_FILE)
    columns = _Columns(memory)
    _take_apart(model.graph, columns)
    products = _choose(model.graph, columns, vocab_size)
    if not products:
        raise ExportError(
            f"There is nothing to quantise as {how}.",
            "No product of the base with a constant matrix was found in the graph.",
            "Export it without --quantize.",
        )
    rewrite: Int8 | Int4 = Int8(model.graph) if how == INT8 else Int4(model.graph)
    for node in products:
        _replace(model.graph, node, rewrite)
    model.opset_imports.setdefault("com.microsoft", 1)
    common.RemoveUnusedNodesPass()(model)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        onnx_ir.save(model, Path(scratch) / contract.MODEL_FILE, external_data=contract.DATA_FILE)
        for name in (contract.MODEL_FILE, contract.DATA_FILE):
            (Path(scratch) / name).replace(folder / name)
    return len(products)


class _Columns:
    """The columns of the memory's matrices: by them its weights are known wherever the fusions have put them."""

    def __init__(self, memory: Sequence[NDArray[Any]]) -> None:
        # By length and content. A column of zeros says nothing about whose it is.
        self._by_length: dict[int, dict[bytes, NDArray[Any]]] = {}
        for weight in memory:
            for column in np.ascontiguousarray(weight.T):
                if column.any():
                    self._by_length.setdefault(len(column), {})[column.tobytes()] = column
        self._found: set[bytes] = set()

    def among(self, weight: NDArray[Any]) -> bool:
        """Whether any is a column of `weight` `[in, out]`; it counts as found then."""
        known = self._by_length.get(len(weight), {})
        # Most columns differ in their first number: the base's need not be copied to be told apart.
        first = np.array([column[0] for column in known.values()], weight.dtype)
        candidates = (weight[:, i].tobytes() for i in np.flatnonzero(np.isin(weight[0], first)))
        matches = known.keys() & set(candidates)
        self._found |= matches
        return bool(matches)

    def check_all_found(self) -> None:
        missing = sum(len(columns.keys() - self._found) for columns in self._by_length.values())
        if missing:
            raise ExportError(
                "The memory's weights cannot be told from the base's in this graph.",
                f"{missing} columns of them are not in it as they are: other weights were joined to them.",
                "Export it without --quantize.",
            )


def _take_apart(graph: onnx_ir.Graph, memory: _Columns) -> None:
    """Take apart products that fusion has packed into one before a `Split`.

    Those of the memory become one of their own, so that the base's beside them can be quantised.
    """
    for node in list(graph):
        if node.domain or node.op_type != "MatMul":
            continue
        users = list(node.outputs[0].uses())
        split = users[0].node if len(users) == 1 and users[0].node.op_type == "Split" else None
        constant = node.inputs[1].const_value if node.inputs[1] is not None else None
        if split is None or constant is None or len(constant.shape) != 2 or len(split.inputs) < 2:
            continue
        sizes = split.inputs[1].const_value if split.inputs[1] is not None else None
        if sizes is None:
            continue
        parts = np.split(_matrix(node), np.cumsum(sizes.numpy())[:-1], axis=1)
        is_memory = [memory.among(part) for part in parts]
        if any(is_memory) and not all(is_memory):
            for kind in (False, True):
                _multiply(graph, node, split, [i for i, of_memory in enumerate(is_memory) if of_memory == kind], parts)


def _multiply(
    graph: onnx_ir.Graph, node: onnx_ir.Node, split: onnx_ir.Node, chosen: Sequence[int], parts: Sequence[NDArray[Any]]
) -> None:
    """Give `split`'s chosen outputs, each x times its part of the matrix, by one product of their own."""
    name = f"{node.outputs[0].name}_{chosen[0]}"
    weight = initializer(graph, f"{name}_weight", np.concatenate([parts[i] for i in chosen], axis=1))
    product = onnx_ir.node("MatMul", [node.inputs[0], weight])
    nodes, outputs = [product], list(product.outputs)
    if len(chosen) > 1:
        sizes = initializer(graph, f"{name}_sizes", np.array([parts[i].shape[1] for i in chosen], np.int64))
        nodes.append(
            onnx_ir.node("Split", [product.outputs[0], sizes], attributes={"axis": -1}, num_outputs=len(chosen))
        )
        outputs = list(nodes[-1].outputs)
    graph.insert_before(node, nodes)
    for i, output in zip(chosen, outputs, strict=True):
        output.type, output.shape = split.outputs[i].type, split.outputs[i].shape
        onnx_ir.convenience.replace_all_uses_with(split.outputs[i], output)


def _choose(graph: onnx_ir.Graph, memory: _Columns, vocab_size: int) -> list[onnx_ir.Node]:
    """The products to quantise."""
    products = []
    for node in graph:
        if node.domain or node.op_type not in ("MatMul", "Gemm"):
            continue
        constant = node.inputs[1].const_value if node.inputs[1] is not None else None
        if constant is None or len(constant.shape) != 2:
            continue
        matrix = _matrix(node)
        if memory.among(matrix) or not matrix.any() or matrix.shape[1] == vocab_size:
            continue
        if node.op_type == "MatMul" or _is_plain(node):
            products.append(node)
    memory.check_all_found()
    return products


def _matrix(node: onnx_ir.Node) -> NDArray[Any]:
    """The constant of a product, `[in, out]`, where it is: mapped."""
    value = node.inputs[1]
    assert value is not None and value.const_value is not None
    matrix = value.const_value.numpy()
    return matrix.T if node.attributes.get_int("transB", 0) else matrix


def _is_plain(gemm: onnx_ir.Node) -> bool:
    """A · B, or A · B + C, and nothing else."""
    get = gemm.attributes.get_float
    return get("alpha", 1.0) == get("beta", 1.0) == 1.0 and gemm.attributes.get_int("transA", 0) == 0


def _replace(graph: onnx_ir.Graph, node: onnx_ir.Node, rewrite: Int8 | Int4) -> None:
    """Put what `rewrite` makes of a product, and the addition of a Gemm, in its place."""
    x, output = node.inputs[0], node.outputs[0]
    assert x is not None
    nodes = rewrite.product(node, x, _matrix(node), output.name or "")
    nodes[-1].outputs[0].type = output.type
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        nodes.append(onnx_ir.node("Add", [nodes[-1].outputs[0], node.inputs[2]]))
    onnx_ir.convenience.replace_nodes_and_values(graph, node, [node], nodes, [output], [nodes[-1].outputs[0]])

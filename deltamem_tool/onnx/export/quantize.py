"""Quantise the base model's weights in an exported graph to 8 or 4 bits. The memory's weights stay float32, unchanged.

This applies to the constant matrices of the base model's products (MatMul, Gemm), and to LM head and embedding, which
have 8 bits in either case. A tied embedding is stored once. The memory and everything else stay unchanged.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from deltamem_tool.onnx.export.deduplicate import store_repeats_once
from deltamem_tool.onnx.export.fused_memory import FusedMemory
from deltamem_tool.onnx.export.graph_edits import MICROSOFT, initializer
from deltamem_tool.onnx.export.quantized_matrices import QuantizedMatrices
from deltamem_tool.onnx.manifest import Quantization

# Operators whose output only has values of their first input: in another shape, type or order, or fewer of them.
MOVING = ("Reshape", "Squeeze", "Unsqueeze", "Flatten", "Cast", "Transpose", "Slice", "GatherElements", "GatherND")


def memory_weights(adapter: DeltaMemAdapter, fused: Mapping[int, FusedMemory]) -> list[NDArray[Any]]:
    """Return every matrix of the memory as it is in the graph, float32 `[in, out]`.

    `fused` has the replacements that were traced, if there are any.
    """
    weights = chain.from_iterable(memory.matrices() for memory in fused.values()) if fused else adapter.parameters()
    return [weight.detach().cpu().numpy().T for weight in weights if weight.dim() == 2]


def quantize_graph(
    folder: Path,
    quantization: Quantization,
    memory: Sequence[NDArray[Any]],
    report: Callable[[int, int], object] | None = None,
) -> int:
    """Quantise the graph in `folder`, in place, and return the number of quantised products.

    Only one matrix is in memory unquantised at a time; the others stay mapped from their file.

    Args:
        folder: folder with `model.onnx` and its data, which are both replaced.
        quantization: bits, groups, and whether there are offsets.
        memory: matrices of the memory, from `memory_weights`.
        report: called after each product with the number of finished products and the total.

    Raises:
        ExportError: the memory's weights do not occur unchanged in the graph, or there is nothing to quantise.
    """
    model = onnx_ir.load(folder / contract.MODEL_FILE)
    columns = _Columns(memory)
    _split_packed_products(model.graph, columns)
    products, of_memory = _products(model.graph, columns)
    if not products:
        raise ExportError(
            f"There is nothing to quantise in {quantization.bits} bits.",
            "The graph has no product of the base model with a constant matrix.",
            "Export it without --quantize.",
        )
    lookups = list(_lookups(model.graph))
    matrices = QuantizedMatrices(model.graph, quantization, {_matrix(node).shape for node in lookups})
    lookups = [node for node in lookups if len(_matrix(node)) % quantization.group_size == 0]
    names = _names([*lookups, *products])
    for node in lookups:
        _replace(model.graph, node, matrices.lookup(_input(node, 1), names[node], _matrix(node)))
    for number, node in enumerate(products, start=1):
        _replace(model.graph, node, matrices.product(_input(node, 0), names[node], _matrix(node)))
        if report is not None:
            report(number, len(products))
    for constant in dict.fromkeys(map(_constant, of_memory)):
        store_repeats_once(model.graph, constant)
    model.opset_imports.setdefault(MICROSOFT, 1)
    common.RemoveUnusedNodesPass()(model)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        onnx_ir.save(model, Path(scratch) / contract.MODEL_FILE, external_data=contract.DATA_FILE)
        for name in (contract.MODEL_FILE, contract.DATA_FILE):
            (Path(scratch) / name).replace(folder / name)
    return len(products)


class _Columns:
    """The columns of the memory's matrices, by which its weights are recognised wherever fusions have placed them."""

    def __init__(self, memory: Sequence[NDArray[Any]]) -> None:
        # By length and content. Columns of zeros are left out, because they could belong to any matrix.
        self._by_length: dict[int, dict[bytes, NDArray[Any]]] = {}
        for weight in memory:
            for column in np.ascontiguousarray(weight.T):
                if column.any():
                    self._by_length.setdefault(len(column), {})[column.tobytes()] = column
        self._found: set[bytes] = set()

    def has_columns_of(self, weight: NDArray[Any]) -> bool:
        """Return whether `weight` `[in, out]` has columns of the memory, and count them as found."""
        known = self._by_length.get(len(weight), {})
        # Most columns differ in their first number, so few of the base model's columns have to be copied.
        first = np.array([column[0] for column in known.values()], weight.dtype)
        candidates = (weight[:, i].tobytes() for i in np.flatnonzero(np.isin(weight[0], first)))
        matches = known.keys() & set(candidates)
        self._found |= matches
        return bool(matches)

    def check_all_found(self) -> None:
        """Check that every column of the memory was in the graph.

        Raises:
            ExportError: a column was not, and may have been quantised.
        """
        missing = sum(len(columns.keys() - self._found) for columns in self._by_length.values())
        if missing:
            raise ExportError(
                "The memory's weights cannot be distinguished from the base model's in this graph.",
                f"{missing} of their columns do not occur in it unchanged: other weights were joined to them.",
                "Export it without --quantize.",
            )


def _split_packed_products(graph: onnx_ir.Graph, memory: _Columns) -> None:
    """Split products that fusions have packed into one before a `Split`.

    The memory's products become a separate one, so that those of the base model can be quantised.
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
        is_memory = [memory.has_columns_of(part) for part in parts]
        if any(is_memory) and not all(is_memory):
            for kind in (False, True):
                _multiply(graph, node, split, [i for i, of_memory in enumerate(is_memory) if of_memory == kind], parts)


def _multiply(
    graph: onnx_ir.Graph, node: onnx_ir.Node, split: onnx_ir.Node, chosen: Sequence[int], parts: Sequence[NDArray[Any]]
) -> None:
    """Compute the chosen outputs of `split`, each x times its part of the matrix, by a separate product."""
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


def _products(graph: onnx_ir.Graph, memory: _Columns) -> tuple[list[onnx_ir.Node], list[onnx_ir.Node]]:
    """Return the products with constant matrices: those to quantise, and those of the memory."""
    products, of_memory = [], []
    for node in filter(_is_product, graph):
        matrix = _matrix(node)
        if memory.has_columns_of(matrix):
            of_memory.append(node)
        elif matrix.any():
            products.append(node)
    memory.check_all_found()
    return products, of_memory


def _is_product(node: onnx_ir.Node) -> bool:
    """Return whether a node computes a · x · W or a · x · W + b, with a number a and a constant matrix W."""
    if (node.domain, node.op_type) not in (("", "MatMul"), ("", "Gemm"), (MICROSOFT, "FusedMatMul")):
        return False
    turned = [node.attributes.get_int(name, 0) for name in ("transA", "transBatchA", "transBatchB")]
    return node.attributes.get_float("beta", 1.0) == 1.0 and not any(turned) and _is_matrix(node.inputs[1])


def _lookups(graph: onnx_ir.Graph) -> Iterator[onnx_ir.Node]:
    """Yield the lookups of tokens in an embedding `[V, D]`."""
    for node in graph:
        if node.domain or node.op_type != "Gather" or node.attributes.get_int("axis", 0) != 0:
            continue
        if _is_matrix(node.inputs[0]) and _are_tokens(node.inputs[1]):
            yield node


def _are_tokens(value: onnx_ir.Value | None) -> bool:
    """Return whether a value consists of `input_ids`, possibly in another shape or order."""
    while value is not None and (node := value.producer()) is not None and node.op_type in MOVING:
        value = node.inputs[0]
    return value is not None and value.is_graph_input() and value.name == contract.INPUT_IDS


def _names(nodes: Sequence[onnx_ir.Node]) -> dict[onnx_ir.Node, str]:
    """Return a name for the matrix of each node. Equal matrices, such as transposed tied ones, get the same name."""
    names: dict[onnx_ir.Node, str] = {}
    # Nodes with different matrices, by the shape and the first column of their matrix.
    first: dict[tuple[tuple[int, ...], bytes], list[onnx_ir.Node]] = {}
    for node in nodes:
        matrix = _matrix(node)
        likely = first.setdefault((matrix.shape, matrix[:, 0].tobytes()), [])
        equal = (other for other in likely if np.array_equal(_matrix(other), matrix))
        other = next(equal, None)
        if other is None:
            likely.append(node)
            name = _constant(node).name or ""
            names[node] = f"{name}_{len(names)}" if name in names.values() else name  # the same constant, transposed
        else:
            names[node] = names[other]
    return names


def _input(node: onnx_ir.Node, index: int) -> onnx_ir.Value:
    value = node.inputs[index]
    assert value is not None
    return value


def _is_matrix(value: onnx_ir.Value | None) -> bool:
    return value is not None and value.const_value is not None and len(value.const_value.shape) == 2


def _constant(node: onnx_ir.Node) -> onnx_ir.Value:
    """Return the constant of a product or of a lookup."""
    return _input(node, 0 if node.op_type == "Gather" else 1)


def _matrix(node: onnx_ir.Node) -> NDArray[Any]:
    """Return the constant of a product or of a lookup of columns as `[in, out]`, without copying the mapped file."""
    constant = _constant(node).const_value
    assert constant is not None
    matrix = constant.numpy()
    by_output = node.op_type == "Gather" or node.attributes.get_int("transB", 0) == 1
    return matrix.T if by_output else matrix


def _replace(graph: onnx_ir.Graph, node: onnx_ir.Node, nodes: list[onnx_ir.Node]) -> None:
    """Replace `node` by `nodes`, followed by the scale and bias of a Gemm or a FusedMatMul."""
    output = node.outputs[0]
    nodes[-1].outputs[0].type = output.type
    if (factor := node.attributes.get_float("alpha", 1.0)) != 1.0:
        scale = initializer(graph, f"{output.name}_scale", np.array(factor, _matrix(node).dtype))
        nodes = [*nodes, onnx_ir.node("Mul", [nodes[-1].outputs[0], scale])]
    if node.op_type == "Gemm" and len(node.inputs) > 2 and node.inputs[2] is not None:
        nodes = [*nodes, onnx_ir.node("Add", [nodes[-1].outputs[0], node.inputs[2]])]
    onnx_ir.convenience.replace_nodes_and_values(graph, node, [node], nodes, [output], [nodes[-1].outputs[0]])

"""Rewrites of products with weights: a projection, its correction and its neighbours, in fewer products."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from deltamem_tool.onnx.export.graph_edits import (
    MICROSOFT,
    copy_dtype,
    initializer,
    node_input,
    producer,
    remove_unused,
    replace_uses,
)

_ATTENTION = "GroupQueryAttention"


@dataclass
class _Terms:
    """A sum of products with weights, and of biases: `x W + r Δ + b`."""

    products: list[tuple[ir.Value, ir.Value]] = field(default_factory=list)  # pairs of an input and its weights
    biases: list[ir.Value] = field(default_factory=list)


def _terms(value: ir.Value | None) -> _Terms | None:
    """Return `value` as a sum of such terms; None if it is not one, or if another node reads a part of it."""
    if value is None:
        return None
    node = producer(value, "MatMul", "Add")
    if node is None:
        return None
    first, second = node_input(node), node_input(node, 1)
    if node.op_type == "MatMul":
        if not _is_weight(second) or _is_weight(first):
            return None
        return _Terms([(first, second)])
    terms = _Terms()
    for part in (first, second):
        if _is_weight(part) and part.shape is not None and len(part.shape) == 1:
            terms.biases.append(part)
            continue
        inner = _terms(part)
        if inner is None or len(part.uses()) > 1:
            return None
        terms.products += inner.products
        terms.biases += inner.biases
    return terms


def _is_weight(value: ir.Value) -> bool:
    """Return whether a value is a weight or computed from weights only."""
    if value.is_initializer():
        return True
    node = value.producer()
    return node is not None and bool(node.inputs) and all(x is not None and _is_weight(x) for x in node.inputs)


def transpose_weights(graph: ir.Graph) -> None:
    """Replace a product that transposes its weight by a `MatMul` with the transposed weight."""
    for node in graph:
        if node.op_type != "FusedMatMul" or node.domain != MICROSOFT or not node.attributes.get_int("transB", 0):
            continue
        others = {"transA": 0, "transBatchA": 0, "transBatchB": 0}
        weight = node_input(node, 1)
        plain = all(node.attributes.get_int(name, default) == default for name, default in others.items())
        if not plain or node.attributes.get_float("alpha", 1.0) != 1 or not _is_matrix_of_one(weight):
            continue
        swapped = ir.node("Transpose", [weight], attributes={"perm": [1, 0]})
        product = ir.node("MatMul", [node_input(node), swapped.outputs[0]])
        if weight.shape is not None:
            swapped.outputs[0].shape = ir.Shape(list(weight.shape)[::-1])
        copy_dtype(weight, swapped.outputs[0])
        graph.insert_before(node, [swapped, product])
        replace_uses(node.outputs[0], product.outputs[0])
        graph.remove(node, safe=True)


def _is_matrix_of_one(value: ir.Value) -> bool:
    """Return whether a value is a matrix of weights with a single user; a tied embedding has two."""
    return _is_weight(value) and value.shape is not None and len(value.shape) == 2 and len(value.uses()) == 1


def join_projections(graph: ir.Graph) -> None:
    """Join the products that compute q, k and v into one, which the attention operator accepts."""
    for node in [node for node in graph if node.op_type == _ATTENTION and node.inputs[1] is not None]:
        values = [node_input(node, position) for position in range(3)]
        parts = [part for value in values if (part := _terms(value)) is not None and len(value.uses()) == 1]
        widths = [width for value in values if (width := _width(value)) is not None]
        packed = _packed_sums(graph, node, parts, widths) if len(parts) == len(widths) == len(values) else None
        if packed is not None:
            for position, value in enumerate((packed, None, None)):
                node.replace_input_with(position, value)


def _packed_sums(graph: ir.Graph, before: ir.Node, parts: list[_Terms], widths: list[int]) -> ir.Value | None:
    """Return the sums side by side `[B, T, q + k + v]`: each input times its weights in every sum, or zeros."""
    inputs = dict.fromkeys(x for part in parts for x, _ in part.products)
    if any(len({x for x, _ in part.products}) < len(part.products) for part in parts):
        return None
    total: ir.Value | None = None
    for x in inputs:
        rows = next(_rows(weight) for part in parts for y, weight in part.products if y is x)
        weights = [dict(part.products).get(x) for part in parts]
        blocks = [
            weight or _zeros(graph, [rows, width], _like(parts)) for weight, width in zip(weights, widths, strict=True)
        ]
        product = ir.node("MatMul", [x, _side_by_side(graph, before, blocks)])
        graph.insert_before(before, product)
        total = _add(graph, before, total, product.outputs[0])
    if any(part.biases for part in parts):
        blocks = [
            part.biases[0] if part.biases else _zeros(graph, [width], _like(parts))
            for part, width in zip(parts, widths, strict=True)
        ]
        if any(len(part.biases) > 1 for part in parts):
            return None
        total = _add(graph, before, total, _side_by_side(graph, before, blocks))
    return total


def _add(graph: ir.Graph, before: ir.Node, total: ir.Value | None, more: ir.Value) -> ir.Value:
    if total is None:
        return more
    add = ir.node("Add", [total, more])
    graph.insert_before(before, add)
    return add.outputs[0]


def _side_by_side(graph: ir.Graph, before: ir.Node, weights: list[ir.Value]) -> ir.Value:
    """Concatenate weights along their last axis."""
    joined = ir.node("Concat", weights, attributes={"axis": -1})
    copy_dtype(weights[0], joined.outputs[0])
    joined.outputs[0].shape = ir.Shape([*list(weights[0].shape or [])[:-1], sum(_width(w) or 0 for w in weights)])
    graph.insert_before(before, joined)
    return joined.outputs[0]


def _zeros(graph: ir.Graph, shape: list[int], like: ir.Value) -> ir.Value:
    assert like.dtype is not None
    return initializer(graph, f"zeros_{'_'.join(map(str, shape))}", np.zeros(shape, like.dtype.numpy()))


def _like(parts: list[_Terms]) -> ir.Value:
    return parts[0].products[0][1]


def _width(value: ir.Value | None) -> int | None:
    size = value.shape[-1] if value is not None and value.shape is not None else None
    return size if isinstance(size, int) else None


def _rows(weight: ir.Value) -> int:
    rows = weight.shape[0] if weight.shape is not None else None
    assert isinstance(rows, int)  # of a constant matrix
    return rows


def join_corrections(graph: ir.Graph) -> None:
    """Compute `x W + r Δ`, a projection and its correction by readings r, as one product `[x, r] [W; Δ]`."""
    joined: dict[tuple[ir.Value, ...], ir.Value] = {}  # joined inputs, which several sums may share
    for node in [node for node in graph if node.op_type == "Add" and not node.domain]:
        users = list(node.outputs[0].uses())
        if any(use.node.op_type == "Add" and _terms(use.node.outputs[0]) is not None for use in users):
            continue  # part of a larger sum
        terms = _terms(node.outputs[0])
        if terms is None or len(terms.products) < 2 or len({weight.dtype for _, weight in terms.products}) > 1:
            continue
        inputs, parts = (tuple(values) for values in zip(*terms.products, strict=True))
        if inputs not in joined:
            both = ir.node("Concat", inputs, attributes={"axis": -1})
            graph.insert_before(node, both)
            joined[inputs] = both.outputs[0]
        weights = ir.node("Concat", parts, attributes={"axis": 0})
        copy_dtype(parts[0], weights.outputs[0])
        weights.outputs[0].shape = ir.Shape([sum(map(_rows, parts)), _width(parts[0])])
        product = ir.node("MatMul", [joined[inputs], weights.outputs[0]])
        graph.insert_before(node, [weights, product])
        total = product.outputs[0]
        for bias in terms.biases:
            total = _add(graph, node, total, bias)
        replace_uses(node.outputs[0], total)
    remove_unused(graph)

"""Rewrites of a traced graph, applied after transformers' fusions. Each has a name by which you can leave it out.

A rewrite does not change what a graph computes, and leaves a graph unchanged if it does not apply. Weights are treated
like any other values: joins of weights are computed when the graph is written (`fold_weights`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as common_passes

from deltamem_tool.errors import ExportError
from deltamem_tool.onnx import contract
from deltamem_tool.onnx.export.graph_edits import (
    MICROSOFT,
    constant,
    copy_dtype,
    initializer,
    node_input,
    only_user,
    producer,
    replace_uses,
)
from deltamem_tool.onnx.export.repeat import fold_weights
from deltamem_tool.onnx.export.targets import Target

LEAN_MEMORY = "lean_memory"  # the memory in as few nodes as possible; applied while tracing, by `fused_memory`
JOINED_CORRECTIONS = "joined_corrections"  # a projection and its correction in one product
JOINED_PROJECTIONS = "joined_projections"  # q, k and v in one product
PLAIN_PRODUCTS, PLAIN_SHAPES = "plain_products", "plain_shapes"
SKIP_NORMS = "skip_norms"  # a sum and its norm in one operator
GATHERED_STATES = "gathered_states"
PLAIN_ATTENTION = "plain_attention"

SCAN, ATTENTION = "LinearAttention", "GroupQueryAttention"
SWAPPED_HEADS = [0, 2, 1, 3]
_SKIP_NORM = {"SimplifiedLayerNormalization": "SkipSimplifiedLayerNormalization"}


def optimize(program: ir.Model, target: Target, without: Collection[str] = ()) -> None:
    """Apply all rewrites except those in `without`, in the order of the table, and compute constants.

    In graphs of standard operators, only the constants are computed.

    Raises:
        ExportError: `without` has an unknown name.
    """
    check_rewrites(without)
    for name, rewrite in REWRITES.items():
        if rewrite is not None and name not in without and not target.is_standard:
            rewrite(program.graph)
    fold_weights(program.graph)
    common_passes.RemoveUnusedNodesPass()(program)


def check_rewrites(without: Collection[str]) -> None:
    """Check that every name is that of a rewrite.

    Raises:
        ExportError: a name is unknown.
    """
    unknown = sorted(set(without) - set(REWRITES))
    if unknown:
        raise ExportError(f"There is no rewrite {unknown[0]!r}.", "", f"The rewrites are {', '.join(REWRITES)}.")


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
    for node in [node for node in graph if node.op_type == ATTENTION and node.inputs[1] is not None]:
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
    assert weight.shape is not None
    return int(weight.shape[0])  # type: ignore[arg-type]  # of a matrix


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
    _drop_unused(graph)


def skip_norms(graph: ir.Graph) -> None:
    """Fuse a sum and its norm into one operator, which returns both."""
    for norm in [node for node in graph if node.op_type in _SKIP_NORM]:
        add = producer(norm.inputs[0], "Add")
        if (
            add is None
            or norm.attributes.get_int("axis", -1) != -1
            or node_input(norm, 1).dtype != add.outputs[0].dtype
        ):
            continue
        first, second = node_input(add), node_input(add, 1)
        if not all(_is_flow(x) for x in (first, second)) or len(node_input(norm, 1).shape or []) != 1:
            continue
        epsilon = norm.attributes.get_float("epsilon", 1e-5)
        inputs = [first, second, node_input(norm, 1)]
        fused = ir.node(
            _SKIP_NORM[norm.op_type], inputs, attributes={"epsilon": epsilon}, domain=MICROSOFT, num_outputs=4
        )
        graph.insert_before(add, fused)
        replace_uses(add.outputs[0], fused.outputs[3])
        replace_uses(norm.outputs[0], fused.outputs[0])
        graph.remove([norm, add], safe=True)
    for node in graph:
        if node.op_type in _SKIP_NORM.values():
            for output in node.outputs[1:]:
                if not output.uses() and not output.is_graph_output():
                    output.name = ""  # so that mean and deviation are not computed


def _is_flow(value: ir.Value) -> bool:
    """Return whether a value is `[B, T, D]` and not a constant that would be broadcast."""
    return not value.is_initializer() and value.shape is not None and len(value.shape) == 3


def _drop_unused(graph: ir.Graph) -> None:
    while unused := [n for n in graph if not any(o.uses() or o.is_graph_output() for o in n.outputs)]:
        graph.remove(unused, safe=True)


def gather_states(graph: ir.Graph) -> None:
    """Reshape the states of all layers together, once before and once after the layers, instead of twice per layer."""
    scans = []
    for scan in graph:
        if scan.op_type != SCAN or len(scan.inputs) < 4:
            continue
        before, after = producer(scan.inputs[3], "Reshape"), only_user(scan.outputs[1], "Reshape")
        if before is None or after is None or not node_input(before, 0).is_graph_input():
            continue
        if after.outputs[0].is_graph_output() and str(after.outputs[0].name).endswith(contract.STATE):
            scans.append((scan, before, after))
    if len(scans) < 2:
        return
    into, back = (constant(node.inputs[1]) for node in scans[0][1:])
    shapes = {str([_shape_of(node) for node in nodes]) for _, *nodes in scans}
    if into is None or back is None or len(shapes) != 1:
        return
    count = len(scans)
    first = graph[0]
    states = _gather_nodes(graph, [node_input(before, 0) for _, before, _ in scans], into * [1, count, 1, 1], "states")
    graph.insert_before(first, states)
    for (scan, before, _), state in zip(scans, states[-1].outputs, strict=True):
        scan.replace_input_with(3, state)
        graph.remove(before, safe=True)
    states = _gather_nodes(graph, [scan.outputs[1] for scan, *_ in scans], back * [1, count, 1, 1], "new_states")
    graph.extend(states)
    for (_, _, after), state in zip(scans, states[-1].outputs, strict=True):
        replace_uses(after.outputs[0], state)
        graph.remove(after, safe=True)


def _gather_nodes(graph: ir.Graph, values: list[ir.Value], shape: np.ndarray, name: str) -> list[ir.Node]:
    """Return nodes that concatenate `values` along axis 1, reshape them, and split them again."""
    joined = ir.node("Concat", values, attributes={"axis": 1})
    shaped = ir.node("Reshape", [joined.outputs[0], initializer(graph, f"{name}_shape", shape)])
    apart = ir.node(
        "Split", shaped.outputs, attributes={"axis": 1, "num_outputs": len(values)}, num_outputs=len(values)
    )
    return [joined, shaped, apart]


def tidy_attention(graph: ir.Graph) -> None:
    """Remove transpositions of queries, keys and values that cancel each other.

    They remain where transformers has split an attention operator that is slower than its parts.
    """
    for node in list(graph):
        if node.op_type == "Reshape" and (same := _unmerged_heads(node)) is not None:
            replace_uses(node.outputs[0], same)
    for node in list(graph):
        inner = producer(node.inputs[0], "Transpose") if node.op_type == "Transpose" else None
        if inner is None:
            continue
        order = [_perm(inner)[axis] for axis in _perm(node)]
        if order == sorted(order):
            replace_uses(node.outputs[0], node_input(inner, 0))
        else:
            node.replace_input_with(0, inner.inputs[0])
            node.attributes["perm"] = ir.AttrInt64s("perm", order)
    _drop_unused(graph)


def _unmerged_heads(node: ir.Node) -> ir.Value | None:
    """Return x if `node` restores the shape of x `[·, ·, heads, width]` after its heads were merged, or else None."""
    merged = producer(node.inputs[0], "Reshape")
    if merged is None or _shape_of(merged) != [0, 0, -1]:
        return None
    x = node_input(merged, 0)
    heads, target = _heads(x), _shape_of(node)
    return x if heads is not None and target == [0, 0, heads, -1] else None


def _heads(value: ir.Value) -> int | None:
    """Return the size of the second-to-last axis of a value with four; None if it is unknown."""
    if value.shape is not None:
        return value.shape[2] if len(value.shape) == 4 and isinstance(value.shape[2], int) else None
    swapped = producer(value, "Transpose")
    product = producer(swapped.inputs[0], "MatMul") if swapped is not None else None
    if product is None or swapped is None or _perm(swapped) != SWAPPED_HEADS:
        return None
    back = producer(product.inputs[1], "Transpose")  # of the values, which have the heads of the product
    if back is None or _perm(back) != SWAPPED_HEADS:
        return None
    shaped = producer(back.inputs[0], "Reshape")
    target = _shape_of(shaped) if shaped is not None else None
    return target[2] if target is not None and len(target) == 4 and target[2] > 0 else _heads(node_input(back, 0))


def rejoin_shapes(graph: ir.Graph) -> None:
    """Remove reshapes that the next one undoes, and reshapes to the same shape."""
    for node in [node for node in graph if node.op_type == "Reshape"]:
        inner = producer(node.inputs[0], "Reshape")
        if inner is not None and node.outputs[0].shape is not None and 0 not in (_shape_of(node) or []):
            node.replace_input_with(0, inner.inputs[0])
        before, after = node_input(node).shape, node.outputs[0].shape
        if before is not None and after is not None and list(before) == list(after) and _is_known(after):
            replace_uses(node.outputs[0], node_input(node))
    _drop_unused(graph)


def _is_known(shape: ir.Shape) -> bool:
    """Return whether every size is a number or has a name."""
    return all(isinstance(size, int) or size.value is not None for size in shape)


REWRITES: dict[str, Callable[[ir.Graph], None] | None] = {
    LEAN_MEMORY: None,
    PLAIN_PRODUCTS: transpose_weights,
    PLAIN_SHAPES: rejoin_shapes,
    JOINED_PROJECTIONS: join_projections,
    JOINED_CORRECTIONS: join_corrections,
    SKIP_NORMS: skip_norms,
    GATHERED_STATES: gather_states,
    PLAIN_ATTENTION: tidy_attention,
}
JOIN_WEIGHTS = (JOINED_CORRECTIONS,)  # rewrites that join the memory's weights with the base model's


def _perm(transpose: ir.Node) -> list[int]:
    return list(transpose.attributes["perm"].as_ints())


def _shape_of(reshape: ir.Node) -> list[int] | None:
    """Return the target shape of a reshape; None if it is not a constant."""
    target = constant(reshape.inputs[1])
    return None if target is None else target.tolist()

"""Rewrites of a traced graph, applied after transformers' fusions. Each has a name by which you can leave it out.

A rewrite does not change what a graph computes, and leaves a graph unchanged if it does not apply. Weights are treated
like any other values: joins of weights are computed when the graph is written (`fold_weights`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as common_passes

from deltamem_tool.errors import ExportError
from deltamem_tool.onnx import contract
from deltamem_tool.onnx.export.graph_edits import (
    MICROSOFT,
    SWAPPED_HEADS,
    constant,
    initializer,
    node_input,
    only_user,
    producer,
    remove_unused,
    replace_uses,
)
from deltamem_tool.onnx.export.product_rewrites import join_corrections, join_projections, transpose_weights
from deltamem_tool.onnx.export.repeat import fold_weights
from deltamem_tool.onnx.export.targets import Target

LEAN_MEMORY = "lean_memory"  # the memory in as few nodes as possible; applied while tracing, by `fused_memory`
JOINED_CORRECTIONS = "joined_corrections"  # a projection and its correction in one product
JOINED_PROJECTIONS = "joined_projections"  # q, k and v in one product
PLAIN_PRODUCTS, PLAIN_SHAPES = "plain_products", "plain_shapes"
SKIP_NORMS = "skip_norms"  # a sum and its norm in one operator
GATHERED_STATES = "gathered_states"
PLAIN_ATTENTION = "plain_attention"

_SCAN = "LinearAttention"
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


def gather_states(graph: ir.Graph) -> None:
    """Reshape the states of all layers together, once before and once after the layers, instead of twice per layer."""
    scans = []
    for scan in graph:
        if scan.op_type != _SCAN or len(scan.inputs) < 4:
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
    remove_unused(graph)


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
    remove_unused(graph)


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

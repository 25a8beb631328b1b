"""Rewrites of a traced graph, after transformers' fusions, each by a name with which it can be left out.

They compute what they replace, and leave a graph alone where they do not apply. Two of the names are not rewrites of
the finished graph but of what is traced: see `fused_memory`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as common_passes

from deltamem_tool.errors import ExportError
from deltamem_tool.onnx import contract

LEAN_MEMORY = "lean_memory"  # the memory in as few nodes as it takes
JOINED_PROJECTIONS = "joined_projections"  # its projections in one product with the base's q, k and v
JOINED_OUTPUT = "joined_output"
GATHERED_STATES = "gathered_states"
PLAIN_ATTENTION = "plain_attention"

SCAN = "LinearAttention"
SWAPPED_HEADS = [0, 2, 1, 3]


def optimize(program: ir.Model, without: Collection[str] = ()) -> None:
    """Apply every rewrite of the table, in its order, but for those named in `without`.

    Raises:
        ExportError: there is no such rewrite.
    """
    check_rewrites(without)
    for name, rewrite in REWRITES.items():
        if rewrite is not None and name not in without:
            rewrite(program.graph)
    common_passes.RemoveUnusedNodesPass()(program)


def check_rewrites(without: Collection[str]) -> None:
    """Check that every name is one of a rewrite.

    Raises:
        ExportError: one is not.
    """
    unknown = sorted(set(without) - set(REWRITES))
    if unknown:
        raise ExportError(f"There is no rewrite {unknown[0]!r}.", "", f"The rewrites are {', '.join(REWRITES)}.")


def join_output(graph: ir.Graph) -> None:
    """`a W + r Δ`, the output projection and its correction by readings r, as one product `[a, r] [W; Δ]`."""
    for product, split in _corrections(graph):
        deltas = _split_weights(product, split)
        if deltas is None:
            continue
        parts = list(split.outputs) if split is not None else [product.outputs[0]]
        rest = []
        for part, delta in zip(parts, deltas, strict=True):
            if not _join_correction(graph, _input(product, 0), part, delta):
                rest.append((part, delta))
        if len(rest) < len(parts):
            _multiply_again(graph, product, split, rest)


def _corrections(graph: ir.Graph) -> Iterator[tuple[ir.Node, ir.Node | None]]:
    """Products of a memory's readings with Δ, and what splits them where several branches are in one."""
    for scan in [node for node in graph if node.op_type == SCAN]:
        readings = _only_user(scan.outputs[0], "Reshape")
        if readings is None:
            continue
        for user, position in list(readings.outputs[0].uses()):
            if user.op_type == "MatMul" and position == 0:
                yield user, _only_user(user.outputs[0], "Split")


def _split_weights(product: ir.Node, split: ir.Node | None) -> list[np.ndarray] | None:
    """Δ of each branch, `[readings, out]`; None where they are not constants."""
    weight = _constant(product.inputs[1])
    if weight is None or weight.ndim != 2:
        return None
    if split is None:
        return [weight]
    sizes = _constant(split.inputs[1]) if len(split.inputs) == 2 else None
    return None if sizes is None else np.split(weight, np.cumsum(sizes)[:-1], axis=1)


def _join_correction(graph: ir.Graph, readings: ir.Value, part: ir.Value, delta: np.ndarray) -> bool:
    """Whether `part` was added to a projection's product, which is now one with it."""
    add = _only_user(part, "Add")
    if add is None:
        return False
    other = _input(add, 1 if add.inputs[0] is part else 0)
    base = _producer(other, "MatMul")
    weight = _constant(base.inputs[1]) if base is not None else None
    if base is None or weight is None or weight.ndim != 2 or weight.dtype != delta.dtype or len(other.uses()) > 1:
        return False
    assert other.name is not None
    joined = _initializer(graph, f"{other.name}_joined", np.concatenate([weight, delta]))
    both = ir.node("Concat", [base.inputs[0], readings], attributes={"axis": -1})
    product = ir.node("MatMul", [both.outputs[0], joined])
    graph.insert_before(add, [both, product])
    _take_over(add.outputs[0], product.outputs[0])
    graph.remove([add, base], safe=True)
    return True


def _multiply_again(
    graph: ir.Graph, product: ir.Node, split: ir.Node | None, rest: list[tuple[ir.Value, np.ndarray]]
) -> None:
    """In the place of `product` and its `split`, the branches that are left."""
    if rest:
        assert product.outputs[0].name is not None
        name = f"{product.outputs[0].name}_rest"
        weight = _initializer(graph, name, np.concatenate([delta for _, delta in rest], axis=1))
        again = [ir.node("MatMul", [product.inputs[0], weight])]
        if len(rest) > 1:
            sizes = _initializer(graph, f"{name}_sizes", np.array([delta.shape[1] for _, delta in rest]))
            inputs = [again[0].outputs[0], sizes]
            again.append(ir.node("Split", inputs, attributes={"axis": -1}, num_outputs=len(rest)))
        graph.insert_before(product, again)
        for (part, _), output in zip(rest, again[-1].outputs, strict=True):
            _take_over(part, output)
    graph.remove([split, product] if split is not None else product, safe=True)


def gather_states(graph: ir.Graph) -> None:
    """One reshape for the states of all layers, on the way in and on the way out, instead of two a layer."""
    scans = []
    for scan in graph:
        if scan.op_type != SCAN or len(scan.inputs) < 4:
            continue
        before, after = _producer(scan.inputs[3], "Reshape"), _only_user(scan.outputs[1], "Reshape")
        if before is None or after is None or not _input(before, 0).is_graph_input():
            continue
        if after.outputs[0].is_graph_output() and str(after.outputs[0].name).endswith(contract.STATE):
            scans.append((scan, before, after))
    if len(scans) < 2:
        return
    into, back = (_constant(node.inputs[1]) for node in scans[0][1:])
    shapes = {str([_shape_of(node) for node in nodes]) for _, *nodes in scans}
    if into is None or back is None or len(shapes) != 1:
        return
    count = len(scans)
    first = graph[0]
    states = _gathered(graph, [_input(before, 0) for _, before, _ in scans], into * [1, count, 1, 1], "states")
    graph.insert_before(first, states)
    for (scan, before, _), state in zip(scans, states[-1].outputs, strict=True):
        scan.replace_input_with(3, state)
        graph.remove(before, safe=True)
    states = _gathered(graph, [scan.outputs[1] for scan, *_ in scans], back * [1, count, 1, 1], "new_states")
    graph.extend(states)
    for (_, _, after), state in zip(scans, states[-1].outputs, strict=True):
        _take_over(after.outputs[0], state)
        graph.remove(after, safe=True)


def _gathered(graph: ir.Graph, values: list[ir.Value], shape: np.ndarray, name: str) -> list[ir.Node]:
    """`values` side by side on axis 1, in another shape, and apart again."""
    joined = ir.node("Concat", values, attributes={"axis": 1})
    shaped = ir.node("Reshape", [joined.outputs[0], _initializer(graph, f"{name}_shape", shape)])
    apart = ir.node(
        "Split", shaped.outputs, attributes={"axis": 1, "num_outputs": len(values)}, num_outputs=len(values)
    )
    return [joined, shaped, apart]


def tidy_attention(graph: ir.Graph) -> None:
    """Remove copies of queries, keys and values between two orders of their axes and back.

    They are left where transformers has taken an attention operator apart that is slower than its parts.
    """
    for node in list(graph):
        if node.op_type == "Reshape" and (same := _reshaped_back(node)) is not None:
            _take_over(node.outputs[0], same)
    for node in list(graph):
        inner = _producer(node.inputs[0], "Transpose") if node.op_type == "Transpose" else None
        if inner is None:
            continue
        order = [_perm(inner)[axis] for axis in _perm(node)]
        if order == sorted(order):
            _take_over(node.outputs[0], _input(inner, 0))
        else:
            node.replace_input_with(0, inner.inputs[0])
            node.attributes["perm"] = ir.AttrInt64s("perm", order)
    while unused := [n for n in graph if not any(o.uses() or o.is_graph_output() for o in n.outputs)]:
        graph.remove(unused, safe=True)


def _reshaped_back(node: ir.Node) -> ir.Value | None:
    """x, if `node` gives x `[·, ·, heads, width]` its shape again after its heads were put into one axis."""
    merged = _producer(node.inputs[0], "Reshape")
    if merged is None or _shape_of(merged) != [0, 0, -1]:
        return None
    x = _input(merged, 0)
    heads, target = _heads(x), _shape_of(node)
    return x if heads is not None and target == [0, 0, heads, -1] else None


def _heads(value: ir.Value) -> int | None:
    """Size of the last axis but one of a value of four, where that is known."""
    if value.shape is not None:
        return value.shape[2] if len(value.shape) == 4 and isinstance(value.shape[2], int) else None
    swapped = _producer(value, "Transpose")
    product = _producer(swapped.inputs[0], "MatMul") if swapped is not None else None
    if product is None or swapped is None or _perm(swapped) != SWAPPED_HEADS:
        return None
    back = _producer(product.inputs[1], "Transpose")  # of the values, whose heads the product has
    if back is None or _perm(back) != SWAPPED_HEADS:
        return None
    shaped = _producer(back.inputs[0], "Reshape")
    target = _shape_of(shaped) if shaped is not None else None
    return target[2] if target is not None and len(target) == 4 and target[2] > 0 else _heads(_input(back, 0))


# None: done while the graph is traced, by `fused_memory`.
REWRITES: dict[str, Callable[[ir.Graph], None] | None] = {
    LEAN_MEMORY: None,
    JOINED_PROJECTIONS: None,
    JOINED_OUTPUT: join_output,
    GATHERED_STATES: gather_states,
    PLAIN_ATTENTION: tidy_attention,
}
JOIN_WEIGHTS = (JOINED_PROJECTIONS, JOINED_OUTPUT)  # what puts the memory's weights into the base's


def _input(node: ir.Node, position: int) -> ir.Value:
    """One that is not left out."""
    value = node.inputs[position]
    assert value is not None
    return value


def _producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op_type else None


def _only_user(value: ir.Value, op_type: str) -> ir.Node | None:
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 and uses[0].node.op_type == op_type else None


def _constant(value: ir.Value | None) -> np.ndarray | None:
    return None if value is None or value.const_value is None else value.const_value.numpy()


def _perm(transpose: ir.Node) -> list[int]:
    return list(transpose.attributes["perm"].as_ints())


def _shape_of(reshape: ir.Node) -> list[int] | None:
    """What a reshape is to, if it is a constant."""
    target = _constant(reshape.inputs[1])
    return None if target is None else target.tolist()


def _initializer(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    value = ir.Value(name=name, const_value=ir.tensor(np.ascontiguousarray(array)))
    value.dtype, value.shape = ir.DataType.from_numpy(array.dtype), ir.Shape(array.shape)
    graph.register_initializer(value)
    return value


def _take_over(old: ir.Value, new: ir.Value) -> None:
    """Whoever reads `old` reads `new`, which has its type and, as an output of the graph, its name."""
    if new.shape is None:
        new.shape = old.shape
    if new.dtype is None and old.dtype is not None:
        new.dtype = old.dtype
    is_output = old.is_graph_output()
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    if is_output:
        new.name, old.name = old.name, None

"""Replace each node that stands for attention in a traced graph by ONNX Runtime's `GroupQueryAttention`.

The operator takes queries, keys and values from the projections, `[B, T, heads · width]`, and rotates them by their
positions, with a table of the cosines and sines of all positions. If a model's angles depend on more than the position
(for example on the length of the text), `RotaryEmbedding` comes before the operator instead. Norms of heads also stay
before it: the operator supports them only for CUDA and WebGPU, where nothing could be compared without a GPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import onnx_ir as ir
import onnxruntime

from deltamem_tool.onnx.contract import BATCH, TOKENS, Interface
from deltamem_tool.onnx.export.attention import ATTENTION, ROTARY
from deltamem_tool.onnx.export.graph_edits import (
    MICROSOFT,
    SWAPPED_HEADS,
    constant,
    copy_dtype,
    initializer,
    node_input,
    producer,
    replace_uses,
)
from deltamem_tool.onnx.export.layers import DOMAIN

POSITIONS = "Positions"  # node type that marks the positions of a call's tokens, int64 [B, T]
# The operator needs these multiples: for the width of a rotated head, and for the width of its tables.
_ROTARY_MULTIPLE, _TABLE_MULTIPLE = 16, 8


def place_attention(graph: ir.Graph, interface: Interface) -> None:
    """Replace every node for attention and rotary embeddings, and the mark of the positions."""
    tables = _Tables(graph, interface)
    for node in [node for node in graph if _is_mark(node, ATTENTION)]:
        _place(graph, node, tables)
    for node in [node for node in graph if _is_mark(node, ROTARY)]:
        _place_rotary(graph, node)
    for node in [node for node in graph if _is_mark(node, POSITIONS)]:
        replace_uses(node.outputs[0], node_input(node))
        graph.remove(node, safe=True)


def _place(graph: ir.Graph, node: ir.Node, tables: _Tables) -> None:
    query, key, value, past_key, past_value, last, total, *sinks = node.inputs
    assert query is not None and key is not None
    attributes = {name: node.attributes[name].value for name in ("heads", "kv_heads", "scale", "softcap", "window")}
    angles: tuple[ir.Value | None, ir.Value | None] = (None, None)
    turned = [turn for turn in map(_turn, (query, key)) if turn is not None]
    interleaved = 0
    width = node.attributes["width"].as_int()
    if len(turned) == 2 and width % _ROTARY_MULTIPLE == 0:
        found = [tables.find(rotary) for rotary, _ in turned]
        if found[0] is not None and found[0] == found[1] and _width(found[0][0]) % _TABLE_MULTIPLE == 0:
            angles, interleaved = found[0], turned[0][0].attributes["interleaved"].as_int()
            query, key = (x for _, x in turned)
    inputs = [*(_flat(graph, node, x) for x in (query, key, value)), past_key, past_value, last, total, *angles]
    inputs += [None, None, *sinks]
    while inputs[-1] is None:
        inputs.pop()
    operator = ir.node(
        "GroupQueryAttention",
        inputs,
        attributes={
            "num_heads": attributes["heads"],
            "kv_num_heads": attributes["kv_heads"],
            "scale": attributes["scale"],
            "do_rotary": int(angles[0] is not None),
            "rotary_interleaved": interleaved,
            "local_window_size": attributes["window"] or -1,
            **({"softcap": attributes["softcap"]} if attributes["softcap"] else {}),
        },
        domain=MICROSOFT,
        num_outputs=3,
    )
    graph.insert_before(node, operator)
    for old, new in zip(node.outputs, operator.outputs, strict=True):
        replace_uses(old, new)
    graph.remove(node, safe=True)


def _turn(x: ir.Value) -> tuple[ir.Node, ir.Value] | None:
    """Return the node that rotates the first or all numbers of each head of `x`, and its input."""
    rotary = producer(x, ROTARY)
    if rotary is not None:
        return rotary, node_input(rotary)
    joined = producer(x, "Concat")
    if joined is None or len(joined.inputs) != 2 or joined.attributes["axis"].as_int() not in (-1, 3):
        return None
    rotary, rest = producer(joined.inputs[0], ROTARY), producer(joined.inputs[1], "Slice")
    first = producer(rotary.inputs[0], "Slice") if rotary is not None else None
    if rotary is None or first is None or rest is None or node_input(first) is not node_input(rest):
        return None
    width, turned = _width(node_input(first)), 2 * _width(node_input(rotary, 1))
    is_cut = _cut(first) == (0, turned) and _cut(rest) == (turned, width)
    return (rotary, node_input(first)) if is_cut else None


def _cut(part: ir.Node) -> tuple[int, int] | None:
    """Return the start and end of a slice of the last of four axes; None if `part` is not such a slice."""
    start, end, axis, step = (
        _number(part.inputs[position]) if position < len(part.inputs) else 1 for position in (1, 2, 3, 4)
    )
    if start is None or end is None or axis not in (-1, 3) or step != 1:
        return None
    return start, min(end, _width(node_input(part)))


def _width(x: ir.Value) -> int:
    """Return the size of the last axis, or 0 if it is unknown."""
    size = x.shape[-1] if x.shape is not None else None
    return size if isinstance(size, int) else 0


def _number(x: ir.Value | None) -> int | None:
    """Return the value of a constant with one element; None if `x` is not one."""
    numbers = constant(x)
    return int(numbers.item()) if numbers is not None and numbers.size == 1 else None


def _flat(graph: ir.Graph, before: ir.Node, x: ir.Value | None) -> ir.Value:
    """Return `x` `[B, heads, T, width]` as the output of the projection, `[B, T, heads · width]`."""
    swapped = producer(x, "Transpose")
    if swapped is not None and list(swapped.attributes["perm"].as_ints()) == SWAPPED_HEADS:
        shaped = producer(swapped.inputs[0], "Reshape")
        if shaped is not None and _is_flat(node_input(shaped)):
            return node_input(shaped)
        x = node_input(swapped)
    else:
        assert x is not None
        transpose = ir.node("Transpose", [x], attributes={"perm": SWAPPED_HEADS})
        graph.insert_before(before, transpose)
        copy_dtype(x, transpose.outputs[0])
        x = transpose.outputs[0]
    reshape = ir.node("Reshape", [x, initializer(graph, "merged_heads", np.array([0, 0, -1]))])
    copy_dtype(x, reshape.outputs[0])
    graph.insert_before(before, reshape)
    return reshape.outputs[0]


def _is_flat(x: ir.Value) -> bool:
    return x.shape is not None and len(x.shape) == 3


class _Tables:
    """Cosines and sines of all positions, `[positions, width / 2]`, if they depend only on the position."""

    def __init__(self, graph: ir.Graph, interface: Interface) -> None:
        self._graph, self._interface = graph, interface
        self._known: dict[tuple[ir.Value, ir.Value], tuple[ir.Value, ir.Value] | None] = {}

    def find(self, rotary: ir.Node) -> tuple[ir.Value, ir.Value] | None:
        """Return the two tables that can replace the angles of a node for rotary embeddings, or None."""
        angles = (node_input(rotary, 1), node_input(rotary, 2))
        if angles not in self._known:
            arrays = self._compute(angles)
            self._known[angles] = None
            if arrays is not None:
                cos, sin = arrays
                self._known[angles] = (
                    initializer(self._graph, "cos_table", cos),
                    initializer(self._graph, "sin_table", sin),
                )
        return self._known[angles]

    def _compute(self, angles: Iterable[ir.Value]) -> list[np.ndarray] | None:
        length = self._interface.room or 0
        half = length // 2
        if half < 2:
            return None
        model = self._model(list(angles))
        if model is None:
            return None
        session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        texts = (slice(0, length), slice(0, half), slice(half, length))
        whole, earlier, later = (self._run(session, np.arange(length)[text]) for text in texts)
        for x, *parts in zip(whole, earlier, later, strict=True):
            if x.shape[0] != 1 or not np.array_equal(x[0], np.concatenate([part[0] for part in parts])):
                return None  # the angles of a position depend on the text
        return [x[0] for x in whole]

    def _model(self, outputs: list[ir.Value]) -> bytes | None:
        """Return the graph from the positions to `outputs`; None if there is none."""
        nodes: dict[ir.Node, None] = {}
        marks: set[ir.Node] = set()

        def visit(value: ir.Value | None) -> None:
            node = value.producer() if value is not None else None
            if node is None or node in nodes:
                return
            if _is_mark(node, POSITIONS):
                marks.add(node)
                return
            for read in node.inputs:
                visit(read)
            nodes[node] = None

        for value in outputs:
            visit(value)
        if len(marks) != 1 or any(node.domain == DOMAIN for node in nodes):
            return None
        positions = marks.pop().outputs[0]
        return _as_model(nodes, positions, outputs, self._graph)

    def _run(self, session: onnxruntime.InferenceSession, positions: np.ndarray) -> list[np.ndarray]:
        sizes = {BATCH: 1, TOKENS: len(positions)}
        shapes = self._interface.inputs()
        feeds: dict[str, np.ndarray] = {}
        for value in session.get_inputs():
            if value.name == POSITIONS:
                feeds[value.name] = positions[None].astype(np.int64)
                continue
            dtype, shape = shapes[value.name]
            array = np.zeros([sizes.get(s, len(positions)) if isinstance(s, str) else s for s in shape], dtype)
            feeds[value.name] = array
        outputs: list[np.ndarray] = session.run(None, feeds)
        return outputs


def _as_model(
    nodes: Mapping[ir.Node, None], positions: ir.Value, outputs: list[ir.Value], graph: ir.Graph
) -> bytes | None:
    """Build a separate model, whose inputs are the positions and the inputs of `graph` that it needs."""
    copies: dict[ir.Value, ir.Value] = {}
    inputs: list[ir.Value] = []
    constants: list[ir.Value] = []

    def copy_value(value: ir.Value | None) -> ir.Value | None:
        if value is None:
            return None
        if value not in copies:
            copy = ir.Value(name=value.name, type=value.type, shape=value.shape, const_value=value.const_value)
            copies[value] = copy
            if value is positions:
                copy.name = POSITIONS
                copy.dtype, copy.shape = ir.DataType.INT64, ir.Shape(["batch", "tokens"])
                inputs.append(copy)
            elif value.const_value is not None:
                constants.append(copy)
            elif value.is_graph_input():
                inputs.append(copy)
        return copies[value]

    new = []
    for node in nodes:
        attributes = list(node.attributes.values())
        if any(attribute.type == ir.AttributeType.GRAPH for attribute in attributes):
            return None
        copy = ir.Node(
            node.domain, node.op_type, [copy_value(x) for x in node.inputs], attributes, num_outputs=len(node.outputs)
        )
        for before, after in zip(node.outputs, copy.outputs, strict=True):
            after.name, after.type, after.shape = before.name, before.type, before.shape
            copies[before] = after
        new.append(copy)
    ends = [copy_value(value) for value in outputs]
    part = ir.Graph(inputs, [end for end in ends if end is not None], nodes=new, opset_imports=graph.opset_imports)
    for value in constants:
        part.register_initializer(value)
    serialized: bytes = ir.to_proto(ir.Model(part, ir_version=10)).SerializeToString()
    return serialized


def _place_rotary(graph: ir.Graph, node: ir.Node) -> None:
    """Replace the node by `RotaryEmbedding`, with the angles of this call's tokens as its table."""
    x, cos, sin = (node_input(node, position) for position in range(3))
    tables = [ir.node("Flatten", [angles], attributes={"axis": 2}) for angles in (cos, sin)]
    shape = ir.node("Shape", [cos], attributes={"start": 0, "end": 2})
    count = ir.node("ReduceProd", [shape.outputs[0]], attributes={"keepdims": 0})
    zero, one = (initializer(graph, f"number_{n}", np.array(n)) for n in (0, 1))
    numbers = ir.node("Range", [zero, count.outputs[0], one])
    positions = ir.node("Reshape", [numbers.outputs[0], shape.outputs[0]])
    rotated = ir.node(
        "RotaryEmbedding",
        [x, positions.outputs[0], tables[0].outputs[0], tables[1].outputs[0]],
        attributes={"interleaved": node.attributes["interleaved"].as_int()},
        domain=MICROSOFT,
    )
    graph.insert_before(node, [*tables, shape, count, numbers, positions, rotated])
    replace_uses(node.outputs[0], rotated.outputs[0])
    graph.remove(node, safe=True)


def _is_mark(node: ir.Node, mark: str) -> bool:
    return node.domain == DOMAIN and node.op_type == mark

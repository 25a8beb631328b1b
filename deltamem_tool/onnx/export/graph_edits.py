"""Helpers with which rewrites edit a graph."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

MICROSOFT = "com.microsoft"  # the domain of ONNX Runtime's own operators
SWAPPED_HEADS = [0, 2, 1, 3]  # permutation from [B, heads, T, width] to [B, T, heads, width], and back


def node_input(node: ir.Node, position: int = 0) -> ir.Value:
    """Return an input of `node`, which must not be left out."""
    value = node.inputs[position]
    assert value is not None
    return value


def producer(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """Return the node that produces `value`, if its type is one of `op_types`, or else None."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type in op_types else None


def only_user(value: ir.Value, op_type: str) -> ir.Node | None:
    """Return the node that reads `value`, if it is the only one and has the type `op_type`, or else None."""
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 and uses[0].node.op_type == op_type else None


def constant(value: ir.Value | None) -> np.ndarray | None:
    """Return the array of a constant; None for any other value."""
    return None if value is None or value.const_value is None else value.const_value.numpy()


def initializer(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """Register a constant under this name, with a number appended if it is taken."""
    value = ir.Value(name=free_name(graph, name), const_value=ir.tensor(np.ascontiguousarray(array)))
    value.dtype, value.shape = ir.DataType.from_numpy(array.dtype), ir.Shape(array.shape)
    graph.register_initializer(value)
    return value


def free_name(graph: ir.Graph, name: str) -> str:
    """Return `name`, with a number appended if it is taken."""
    number, free = 0, name
    while free in graph.initializers:
        number += 1
        free = f"{name}_{number}"
    return free


def replace_uses(old: ir.Value, new: ir.Value) -> None:
    """Replace `old` by `new` wherever it is read. `new` gets its type and, as an output of the graph, its name."""
    if new.shape is None:
        new.shape = old.shape
    copy_dtype(old, new)
    is_output = old.is_graph_output()
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    if is_output:
        new.name, old.name = old.name, None


def copy_dtype(source: ir.Value | None, value: ir.Value) -> None:
    """Set the type of `value`, which is unknown, to that of `source`."""
    if value.dtype is None and source is not None and source.dtype is not None:
        value.dtype = source.dtype


def remove_unused(graph: ir.Graph) -> None:
    """Remove the nodes whose outputs nobody reads."""
    while unused := [n for n in graph if not any(o.uses() or o.is_graph_output() for o in n.outputs)]:
        graph.remove(unused, safe=True)

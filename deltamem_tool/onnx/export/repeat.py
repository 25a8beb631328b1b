"""Copy traced layers in a graph, each copy with its own weights, and precompute values that only depend on weights.

A graph is optimised without the weights of its layers (`without_weights`). Whatever is computed from such a weight
stays in the graph, because the weight of another layer will replace it. `LayerRepeater` replaces each layer that was
not traced by a copy of its original. At the end, `fold_weights` turns values computed from weights (transposed, joined,
scaled) into weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator
from onnx_ir.tensor_adapters import TorchTensor
from torch import Tensor

from deltamem_tool.onnx import contract
from deltamem_tool.onnx.export.graph_edits import free_name, node_input, replace_uses
from deltamem_tool.onnx.export.layers import BEGIN, COPY, DOMAIN, END, LAYER


@contextmanager
def without_weights(graph: ir.Graph, names: set[str]) -> Iterator[None]:
    """Turn the initializers `names` into inputs of the graph inside the block, so that no pass sees their values."""
    values = {name: graph.initializers.pop(name) for name in names if name in graph.initializers}
    constants = {name: value.const_value for name, value in values.items()}
    for value in values.values():
        value.const_value = None
        graph.inputs.append(value)
    try:
        yield
    finally:
        for name, value in values.items():
            graph.inputs.remove(value)
            value.const_value = constants[name]
            graph.initializers[name] = value


class LayerRepeater:
    """Inserts the copies of layers into a graph.

    Args:
        graph: the traced graph.
        copies: for each layer that was not traced, the layer that it is a copy of.
        own: names of each layer's own weights, by their names inside the layer.
        weights: all weights of the model and the adapter, by their names in the graph.
    """

    def __init__(
        self,
        graph: ir.Graph,
        copies: Mapping[int, int],
        own: Mapping[int, Mapping[str, str]],
        weights: Mapping[str, Tensor],
    ) -> None:
        self._graph, self._copies, self._own, self._weights = graph, copies, own, weights
        self._parts = {layer: {name: part for part, name in names.items()} for layer, names in own.items()}
        self._inputs = {str(value.name): value for value in graph.inputs}
        self._marks = {op: {_layer(node): node for node in graph if _is_mark(node, op)} for op in (BEGIN, END)}
        self._sizes = {symbol for value in graph.inputs for size in value.shape or () for symbol in _symbols(size)}
        self._places = {_layer(node): node for node in graph if _is_mark(node, COPY)}

    def repeat(self) -> None:
        """Insert the copies and remove the marks."""
        bodies = {original: self._body(original) for original in set(self._copies.values())}
        for layer, place in self._places.items():
            self._put_copy(place, bodies[self._copies[layer]], self._copies[layer], layer)
        for nodes in self._marks.values():
            for node in nodes.values():
                replace_uses(node.outputs[0], node_input(node))
                self._graph.remove(node, safe=True)

    def _body(self, layer: int) -> list[ir.Node]:
        """Return a layer's own nodes: those that depend on its input, its past or its weights, up to its output."""
        begin, end = (self._marks[mark][layer] for mark in (BEGIN, END))
        own = {begin.outputs[0]}
        for value in (*self._graph.inputs, *self._graph.initializers.values()):
            if self._belongs(value.name or "", layer):
                own.add(value)
        body = []
        for node in self._graph:
            # Sizes are the same in every layer, so copies read those of the original.
            sizes = node.op_type == "Shape" and self._is_of_inputs(node_input(node).shape)
            if node not in (begin, end) and not sizes and any(value in own for value in _read_values(node)):
                own.update(node.outputs)
                body.append(node)
        return body

    def _belongs(self, name: str, layer: int) -> bool:
        past = tuple(f"{prefix}.{layer}." for prefix in (contract.PAST, contract.INITIAL))
        return name in self._parts[layer] or name.startswith(past)

    def _put_copy(self, place: ir.Node, body: list[ir.Node], original: int, layer: int) -> None:
        begin, end = (self._marks[mark][original] for mark in (BEGIN, END))
        copied: dict[ir.Value, ir.Value] = {begin.outputs[0]: node_input(place)}

        def value_for(value: ir.Value | None) -> ir.Value | None:
            if value is None or value in copied:
                return None if value is None else copied[value]
            name = value.name or ""
            if value.is_graph_input() and self._belongs(name, original):
                copied[value] = self._input(_of_layer(name, layer), value)
            elif value.is_initializer() and self._belongs(name, original):
                copied[value] = self._weight(self._own[layer][self._parts[original][name]], value)
            else:
                return value
            return copied[value]

        nodes = []
        for node in body:
            copy = ir.Node(
                node.domain,
                node.op_type,
                [value_for(value) for value in node.inputs],
                [_copied_attribute(attribute) for attribute in node.attributes.values()],
                overload=node.overload,
                num_outputs=len(node.outputs),
                version=node.version,
            )
            for before, after in zip(node.outputs, copy.outputs, strict=True):
                after.type, after.shape = before.type, self._copied_shape(before.shape)
                copied[before] = after
            nodes.append(copy)
        self._graph.insert_before(place, nodes)
        for value in list(self._graph.outputs):
            if value in copied:
                copied[value].name = _of_layer(str(value.name), layer)
                self._graph.outputs.append(copied[value])
        replace_uses(place.outputs[0], copied[node_input(end)])
        self._graph.remove(place, safe=True)

    def _is_of_inputs(self, shape: ir.Shape | None) -> bool:
        """Return whether every size is a number or depends only on sizes of the graph's inputs."""
        sizes = [None] if shape is None else list(shape)
        return all(
            isinstance(size, int) or (size is not None and size.value is not None and _symbols(size) <= self._sizes)
            for size in sizes
        )

    def _copied_shape(self, shape: ir.Shape | None) -> ir.Shape | None:
        """Return `shape` without the names of sizes that depend on data, such as an expert's number of tokens."""
        if shape is None:
            return None
        return ir.Shape([size if _symbols(size) <= self._sizes else None for size in shape])

    def _input(self, name: str, like: ir.Value) -> ir.Value:
        if name not in self._inputs:
            self._inputs[name] = ir.Value(name=name, type=like.type, shape=like.shape)
            self._graph.inputs.append(self._inputs[name])
        return self._inputs[name]

    def _weight(self, name: str, like: ir.Value) -> ir.Value:
        if name not in self._graph.initializers:
            value = ir.Value(
                name=name, const_value=TorchTensor(self._weights[name], name), type=like.type, shape=like.shape
            )
            self._graph.register_initializer(value)
        return self._graph.initializers[name]


def fold_weights(graph: ir.Graph) -> None:
    """Replace every node that only reads weights by its result, computed when the graph is written."""
    for node in list(graph):
        values = [value for value in node.inputs if value is not None]
        if not values or node.domain or not all(value.is_initializer() for value in values):
            continue
        if any(isinstance(attribute.value, ir.Graph) for attribute in node.attributes.values()):
            continue
        computed = _Computed(node)
        for position, output in enumerate(node.outputs):
            if not output.uses() and not output.is_graph_output():
                continue
            tensor = computed.output(position, output)
            name = output.name or f"{values[0].name}_{node.op_type}"
            constant = ir.Value(name=free_name(graph, name), const_value=tensor, shape=ir.Shape(tensor.shape.numpy()))
            constant.dtype = tensor.dtype
            output.name = None
            graph.register_initializer(constant)
            replace_uses(output, constant)
        graph.remove(node, safe=True)


class _Computed:
    """The outputs of a node whose inputs are constants."""

    def __init__(self, node: ir.Node) -> None:
        self._inputs = [value.const_value if value is not None else None for value in node.inputs]
        names = [f"i{position}" if value is not None else "" for position, value in enumerate(node.inputs)]
        attributes = [ir.to_proto(attribute) for attribute in node.attributes.values()]
        self._outputs = [f"o{position}" for position in range(len(node.outputs))]
        proto = onnx.helper.make_node(node.op_type, names, self._outputs)
        proto.attribute.extend(attributes)
        self._node = proto

    def output(self, position: int, like: ir.Value) -> ir.TensorProtocol:
        """Return one output, with the type and shape of `like`, which is computed whenever it is read."""
        compute = partial(self._compute, position)
        if like.dtype is None or like.shape is None or not all(isinstance(size, int) for size in like.shape):
            return compute()
        return ir.LazyTensor(compute, dtype=like.dtype, shape=like.shape, name=like.name)

    def _compute(self, position: int) -> ir.TensorProtocol:
        arrays = {f"i{i}": tensor.numpy() for i, tensor in enumerate(self._inputs) if tensor is not None}
        results: Any = ReferenceEvaluator(self._node).run(None, arrays)
        return ir.tensor(np.ascontiguousarray(results[position]))  # other arrays are written number by number


def _symbols(size: int | ir.SymbolicDim) -> set[str]:
    """Return the symbols in a size; none if it is a number."""
    return set() if isinstance(size, int) else set(re.findall(r"[A-Za-z_]\w*", size.value or ""))


def _layer(node: ir.Node) -> int:
    return node.attributes[LAYER].as_int()


def _of_layer(name: str, layer: int) -> str:
    """Return the name of the same part in another layer, such as `present.3.key`."""
    prefix, _, part = name.split(".", 2)
    return contract.carried_name(prefix, layer, part)


def _is_mark(node: ir.Node, mark: str) -> bool:
    return node.domain == DOMAIN and node.op_type == mark


def _read_values(node: ir.Node) -> Iterator[ir.Value]:
    """Yield the inputs of a node, and the outer values that its subgraphs read."""
    yield from (value for value in node.inputs if value is not None)
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            inside = attribute.as_graph()
            for inner in inside:
                yield from (value for value in _read_values(inner) if value.graph is not inside)


def _copied_attribute(attribute: ir.Attr) -> ir.Attr:
    """Copy an attribute. A subgraph is cloned, because it belongs to one node; it only reads values of all layers."""
    if attribute.type != ir.AttributeType.GRAPH:
        return attribute
    return ir.AttrGraph(attribute.name, attribute.as_graph().clone(allow_outer_scope_values=True))

"""Decoder layers that are alike are traced once.

While a model is traced, the first layer of each kind runs between two marks, and every other one leaves one node that
stands for it. Two layers are of a kind if their modules, shapes and settings are alike and they are called with the
same arguments. `repeat_layers` puts a copy of what was traced in the place of each such node, with its own weights.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from deltamem_tool.base_model.attention import attention_layers
from deltamem_tool.memory.adapter import DeltaMemAdapter
from deltamem_tool.onnx.contract import Interface

DOMAIN = "deltamem"  # of nodes that no graph keeps
BEGIN, END, COPY = "LayerBegin", "LayerEnd", "LayerCopy"
LAYER, ORIGINAL = "layer", "original"  # attributes: a layer's index, and that of the traced layer which it copies
# What the number of a layer is called in the modules of a model: layers that differ by it alone are alike.
_INDEX = re.compile(r"(layer_?|block_?|l)?(idx|index|id|number)")
_PLAIN = (int, float, bool, str, type(None), torch.dtype)

Past = Sequence[Mapping[str, Tensor]]  # what each layer is given, by part
_Key = tuple[Any, ...]


class TracedLayers:
    """The decoder layers of a model while it is traced.

    Args:
        model: has a memory, or had one.
        adapter: that memory; None for a graph without one.
        interface: of the graph.
    """

    def __init__(self, model: nn.Module, adapter: DeltaMemAdapter | None, interface: Interface) -> None:
        self.names = _layer_names(model)
        self._layers = {index: model.get_submodule(name) for index, name in self.names.items()}
        self._adapter, self._interface = adapter, interface
        self._past: Past = ()
        self._originals: dict[_Key, tuple[int, Any]] = {}  # index and result of each kind's first layer
        self._arguments: list[Any] = []  # their ids are in keys: nothing else may get one of them
        self.present: dict[int, dict[str, Tensor]] = {}  # what the layers that were not traced give, by part

    @contextmanager
    def call(self, past: Past) -> Iterator[None]:
        """Inside, layers that are alike run once. `past` is what the graph is given for each."""
        self._past, self._originals, self._arguments, self.present = past, {}, [], {}
        own = {index: vars(layer).get("forward") for index, layer in self._layers.items()}
        for index, layer in self._layers.items():
            vars(layer)["forward"] = self._once(index, layer.forward)
        try:
            yield
        finally:
            for index, layer in self._layers.items():
                del vars(layer)["forward"]
                if own[index] is not None:
                    vars(layer)["forward"] = own[index]
            self._originals, self._arguments = {}, []

    def _once(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        signature = self._signature(index)

        def run(*args: Any, **kwargs: Any) -> Any:
            positional = bool(args)
            hidden = args[0] if positional else kwargs.pop("hidden_states")
            key = (signature, positional, _key(args[1:]), _key(kwargs))
            if key in self._originals:
                return self._copy(index, hidden, *self._originals[key])
            self._arguments.append((args, kwargs))
            begin = _node(BEGIN, hidden, index)
            result = forward(begin, *args[1:], **kwargs) if positional else forward(hidden_states=begin, **kwargs)
            output, *others = result if isinstance(result, tuple) else (result,)
            output = _node(END, output, index)
            result = (output, *others) if isinstance(result, tuple) else output
            if all(other is None for other in others):
                self._originals[key] = (index, result)
            return result

        return run

    def _copy(self, index: int, hidden: Tensor, original: int, result: Any) -> Any:
        """One node for layer `index`: its input and past go in, its output and present come out."""
        past = self._past[index] if index < len(self._past) else {}
        tensors = [hidden, *past.values()]
        # Their shapes are those of what will take its place.
        outputs = torch.onnx.ops.symbolic_multi_out(
            f"{DOMAIN}::{COPY}",
            tensors,
            {LAYER: index, ORIGINAL: original},
            dtypes=[x.dtype for x in tensors],
            shapes=[list(x.shape) for x in tensors],
            version=1,
        )
        output, *present = outputs
        self.present[index] = dict(zip(past, present, strict=True))
        return (output, *result[1:]) if isinstance(result, tuple) else output

    def _signature(self, index: int) -> _Key:
        """What has to be alike beside the arguments."""
        memory = None
        if self._adapter is not None and str(index) in self._adapter.layers:
            memory = _described(self._adapter.layers[str(index)])
        held = self._interface.layers[index] if index < len(self._interface.layers) else None
        return (_described(self._layers[index]), memory, held)


def _layer_names(model: nn.Module) -> dict[int, str]:
    """The decoder layers by index: the modules of the list that the attention modules are in."""
    names = {}
    for layer in attention_layers(model):  # type: ignore[arg-type]  # a model of transformers
        parts = layer.name.split(".")
        position = next((i for i in range(len(parts) - 1, 0, -1) if parts[i] == str(layer.index)), None)
        if position is not None and isinstance(model.get_submodule(".".join(parts[:position])), nn.ModuleList):
            names[layer.index] = ".".join(parts[: position + 1])
    return names


def _described(module: nn.Module) -> _Key:
    """Types, shapes and plain settings of a module and those in it."""
    described = []
    for name, part in module.named_modules():
        tensors = [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]
        shapes = tuple((key, tuple(x.shape), x.dtype) for key, x in tensors)
        settings = tuple(
            (key, value)
            for key, value in sorted(vars(part).items())
            if isinstance(value, _PLAIN) and not _INDEX.fullmatch(key)
        )
        described.append((name, type(part), shapes, settings))
    return tuple(described)


def _key(argument: Any) -> Any:
    """Two arguments are the same if this is equal."""
    if isinstance(argument, dict):
        return tuple((name, _key(value)) for name, value in sorted(argument.items()))
    if isinstance(argument, list | tuple):
        return tuple(map(_key, argument))
    return argument if isinstance(argument, _PLAIN) else id(argument)


def _node(name: str, x: Tensor, layer: int) -> Tensor:
    """One node that gives what it takes."""
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::{name}", [x], {LAYER: layer}, dtype=x.dtype, shape=list(x.shape), version=1
    )

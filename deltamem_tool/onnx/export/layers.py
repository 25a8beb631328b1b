"""Trace identical decoder layers only once.

Two layers are identical if their modules, shapes and settings are, and they are called with the same arguments. The
model runs once to find out. While it is traced, the first layer of each kind runs between two marks, and every other
one leaves a node that stands for it. `repeat` replaces each of these nodes by a copy of the traced layer with the
layer's own weights.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deltamem_tool._compat import hooks_of
from deltamem_tool.base_model.attention import attention_layers
from deltamem_tool.memory.adapter import DeltaMemAdapter
from deltamem_tool.memory.attachment import find_attachment
from deltamem_tool.onnx.contract import Interface

DOMAIN = "deltamem"  # of nodes that are replaced before a graph is written
BEGIN, END, COPY = "LayerBegin", "LayerEnd", "LayerCopy"  # their output is their input
HIDDEN = "hidden_states"  # name of a layer's first argument
LAYER = "layer"  # attribute of these nodes: the index of the layer
# Names of a layer's index in the modules of a model: layers may differ in it and still be identical.
_INDEX = re.compile(r"(layer_?|block_?|l)?(idx|index|id|number)")
_PLAIN = (int, float, bool, str, type(None), torch.dtype)

Past = Sequence[Mapping[str, Tensor]]  # the carried tensors of each layer, by part
_Key = tuple[Any, ...]
_Forward = Callable[..., Any]


class TracedLayers:
    """The decoder layers of a model while it is traced.

    Args:
        model: the model, with its memory or after it was detached.
        adapter: the memory; None for a graph without one.
        interface: interface of the graph.
        call: function that calls the model with padding, so that it builds every mask.

    Attributes:
        names: names of the layers' modules, by index.
        copies: for each layer that is not traced, by index, the layer that it is a copy of.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        adapter: DeltaMemAdapter | None,
        interface: Interface,
        call: Callable[[], object],
    ) -> None:
        self._model, self._adapter, self._interface = model, adapter, interface
        self.names = _layer_names(model)
        self._layers = {index: model.get_submodule(name) for index, name in self.names.items()}
        self._users = Counter(id(x) for layer in self._layers.values() for x in _tensors(layer).values())
        self.copies: dict[int, int] = {}
        self._others: dict[int, int | None] = {}  # of originals: the number of None after the output; None: no tuple
        self._find(call)

    def _find(self, call: Callable[[], object]) -> None:
        """Find the layers that are copies, and their originals."""
        first: dict[_Key, int] = {}
        kept: list[Any] = []  # arguments whose ids are in keys are kept alive, so that no other object gets their ids

        def watch(index: int, forward: _Forward) -> _Forward:
            signature = self._signature(index)

            def run(*args: Any, **kwargs: Any) -> Any:
                _, args_beside, kwargs_beside = _split_arguments(args, kwargs)
                kept.append((args, kwargs))
                key = (signature, bool(args), _key(args_beside), _key(kwargs_beside))
                result = forward(*args, **kwargs)
                others = result[1:] if isinstance(result, tuple) else ()
                if any(other is not None for other in others):
                    return result  # later layers may use it
                if key in first:
                    self.copies[index] = first[key]
                else:
                    first[key] = index
                    self._others[index] = len(others) if isinstance(result, tuple) else None
                return result

            return run

        with self._forwards(watch), torch.no_grad():
            call()

    @contextmanager
    def without_copies(self) -> Iterator[None]:
        """Remove the weights of copies inside the block, where each copy only leaves a node."""
        adapter_layers = self._adapter.layers if self._adapter is not None else nn.ModuleDict()
        memories = {str(i): adapter_layers[str(i)] for i in self.copies if str(i) in adapter_layers}
        parents = {i: self._model.get_submodule(self.names[i].rpartition(".")[0]) for i in self.copies}
        adapter_layers.update({index: nn.Identity() for index in memories})
        for index, parent in parents.items():
            setattr(parent, str(index), _Copy(self._layers[index], partial(self._copy_node, index)))
        attachment = find_attachment(self._model)
        path = [] if attachment is None else attachment.path
        if attachment is not None:
            attachment.path = []  # otherwise its hooks would look for the modules of the layers
        try:
            yield
        finally:
            if attachment is not None:
                attachment.path = path
            adapter_layers.update(memories)
            for index, parent in parents.items():
                setattr(parent, str(index), self._layers[index])

    def mark_originals(self) -> AbstractContextManager[None]:
        """Make originals run between marks inside the block."""
        return self._forwards(self._run_between_marks)

    @contextmanager
    def _forwards(self, wrap: Callable[[int, _Forward], _Forward]) -> Iterator[None]:
        """Replace each layer's `forward` by the result of `wrap` inside the block."""
        own = {index: vars(layer).get("forward") for index, layer in self._layers.items()}
        for index, layer in self._layers.items():
            vars(layer)["forward"] = wrap(index, layer.forward)
        try:
            yield
        finally:
            for index, layer in self._layers.items():
                del vars(layer)["forward"]
                if own[index] is not None:
                    vars(layer)["forward"] = own[index]

    def _run_between_marks(self, index: int, forward: _Forward) -> _Forward:
        if index not in self.copies.values():
            return forward

        def run(*args: Any, **kwargs: Any) -> Any:
            hidden, args_beside, kwargs_beside = _split_arguments(args, kwargs)
            begin = _node(BEGIN, hidden, index)
            given = {} if args else {HIDDEN: begin}
            result = forward(*([begin, *args_beside] if args else []), **given, **kwargs_beside)
            output, *others = result if isinstance(result, tuple) else (result,)
            output = _node(END, output, index)
            return (output, *others) if isinstance(result, tuple) else output

        return run

    def _copy_node(self, index: int, *args: Any, **kwargs: Any) -> Any:
        """Return the node for layer `index`. Its other inputs and outputs are added with the copy."""
        output, others = _node(COPY, _split_arguments(args, kwargs)[0], index), self._others[self.copies[index]]
        return output if others is None else (output, *[None] * others)

    def _signature(self, index: int) -> _Key:
        """Return everything besides the arguments that has to be equal in identical layers."""
        memory = None
        if self._adapter is not None and str(index) in self._adapter.layers:
            memory = _describe_module(self._adapter.layers[str(index)])
        held = self._interface.layers[index] if index < len(self._interface.layers) else None
        layer = self._layers[index]
        shared = tuple((name, id(x)) for name, x in _tensors(layer).items() if self._users[id(x)] > 1)
        return (_describe_module(layer), memory, held, shared)


class _Copy(nn.Module):
    """A replacement for a layer, without its weights. All other attributes are those of the layer."""

    def __init__(self, layer: nn.Module, run: _Forward) -> None:
        super().__init__()
        self._of, self._run = (layer,), run  # a tuple, so that the layer is not registered as a submodule

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._of[0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Leave a node."""
        return self._run(*args, **kwargs)


def _split_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Split the arguments of a layer into the hidden states and all others."""
    if args:
        return args[0], args[1:], kwargs
    return kwargs[HIDDEN], (), {name: value for name, value in kwargs.items() if name != HIDDEN}


def _layer_names(model: PreTrainedModel) -> dict[int, str]:
    """Return the names of the decoder layers by index: the modules of the list that contains the attention modules.

    Empty if a layer of the model has several attention modules, because their indices are not those of layers.
    """
    names: dict[int, str] = {}
    for layer in attention_layers(model):
        parts = layer.name.split(".")
        position = next((i for i in range(len(parts) - 1, 0, -1) if parts[i] == str(layer.index)), None)
        if position is None:
            return {}
        if isinstance(model.get_submodule(".".join(parts[:position])), nn.ModuleList):
            names |= _siblings(model, ".".join(parts[:position]))
    return names


def _siblings(model: PreTrainedModel, parent: str) -> dict[int, str]:
    """Return the names of all modules in a list of layers; some layers of a hybrid have no attention."""
    return {int(number): f"{parent}.{number}" for number, _ in model.get_submodule(parent).named_children()}


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by name, each once."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _describe_module(module: nn.Module) -> _Key:
    """Describe the types, shapes, settings and hooks of a module and its submodules."""
    described = []
    for name, part in module.named_modules():
        tensors = [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]
        shapes = tuple((key, tuple(x.shape), x.dtype) for key, x in tensors)
        settings = tuple(
            (key, _setting(value)) for key, value in sorted(vars(part).items()) if not _INDEX.fullmatch(key)
        )
        # The hooks of a memory are partials of the same function.
        functions = tuple(id(hook.func if isinstance(hook, partial) else hook) for hook in hooks_of(part))
        described.append((name, type(part), shapes, settings, functions))
    return tuple(described)


def _setting(value: Any) -> Any:
    """Return a value by which settings are compared; None if `value` is not a setting."""
    if isinstance(value, Tensor):  # neither a parameter nor a buffer: it becomes a constant of the graph
        return id(value)
    if isinstance(value, list | tuple):
        return tuple(map(_setting, value))
    return value if isinstance(value, _PLAIN) else None


def _key(argument: Any) -> Any:
    """Return a value by which arguments are compared."""
    if isinstance(argument, dict):
        return tuple((name, _key(value)) for name, value in sorted(argument.items()))
    if isinstance(argument, list | tuple):
        return tuple(map(_key, argument))
    return argument if isinstance(argument, _PLAIN) else id(argument)


def _node(name: str, x: Tensor, layer: int) -> Tensor:
    """Return the output of a node that passes `x` through."""
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::{name}", [x], {LAYER: layer}, dtype=x.dtype, shape=list(x.shape), version=1
    )

"""Gradient checkpointing that works with caches.

A decoder layer keeps only its input, and runs again in the backward pass. transformers' own gradient checkpointing
disables the cache, because a layer that runs twice would append to it twice. Here the second run gets the cache as it
was before the first one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache, PreTrainedModel

from deltamem_tool._compat import GradientCheckpointingLayer, tree_map_only
from deltamem_tool.errors import ConfigError
from deltamem_tool.memory.decoder_call import current_call, repeat_call


@contextmanager
def recompute_layers(model: PreTrainedModel) -> Iterator[None]:
    """Run the layers of `model` without keeping activations, inside the block. The backward pass may come after it.

    Raises:
        ConfigError: none of the model's layers is a GradientCheckpointingLayer of transformers.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ConfigError(
            f"{type(model).__name__} cannot recompute its layers.",
            "None of them is a GradientCheckpointingLayer of transformers.",
            "Set training.gradient_checkpointing to false.",
        )
    for layer in layers:
        layer.forward = _recompute(layer.forward, _indices(layer))
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # the class's own shows again


def _indices(layer: nn.Module) -> list[int]:
    """The layers of the cache that a decoder layer writes to."""
    named = {getattr(module, "layer_idx", None) for module in layer.modules()}
    return sorted(index for index in named if isinstance(index, int))


def _recompute(forward: Callable[..., Any], indices: list[int]) -> Callable[..., Any]:
    def recomputed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        call, first = current_call(), True
        kept = [value for value in (*args, *kwargs.values()) if isinstance(value, Cache)]
        before = {id(cache): _snapshot(cache, indices) for cache in kept}

        def restored(value: Any) -> Any:
            return before[id(value)]() if isinstance(value, Cache) else value

        def run(*args: Any) -> Any:
            nonlocal first
            if first:
                first = False
                return forward(*args, **kwargs)
            with repeat_call(call):
                return forward(*map(restored, args), **{name: restored(value) for name, value in kwargs.items()})

        return checkpoint(run, *args, use_reentrant=False)

    return recomputed


def _snapshot(cache: Cache, indices: list[int]) -> Callable[[], Cache]:
    """Copies of the cache as it is now, of which the given layers can be written to."""
    kept = {index: _copy_layer(cache.layers[index]) for index in indices if index < len(cache.layers)}

    def restore() -> Cache:
        restored = copy.copy(cache)
        restored.layers = list(cache.layers)
        for index, layer in kept.items():
            restored.layers[index] = _copy_layer(layer)
        return restored

    return restore


def _copy_layer(layer: Any) -> Any:
    """Keys and values are replaced when they grow, but recurrent states are written into, which copies must not see."""
    copied = copy.copy(layer)
    for name, value in vars(layer).items():
        if name not in ("keys", "values"):
            setattr(copied, name, tree_map_only(Tensor, Tensor.clone, value))
    return copied

"""States that hybrid layers keep besides keys and values, of convolutions and of linear attention, by row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from deltamem_tool._compat import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

CONVOLUTION, RECURRENT = "convolution", "recurrent"
States = Mapping[tuple[str, int], Tensor]  # `[B, …]` of one layer, by kind and number


def states_of(layer: LinearAttentionLayer) -> States:
    """The states of a layer of the cache."""
    kinds = {CONVOLUTION: layer.conv_states, RECURRENT: layer.recurrent_states}
    return {(kind, i): state for kind, states in kinds.items() for i, state in states.items() if state is not None}


def fill_states(layer: LinearAttentionLayer, states: States) -> None:
    """Have a new layer of the cache begin with copies of `states`: transformers changes them in place."""
    for (kind, number), state in states.items():
        state = state.clone()
        if kind == CONVOLUTION:
            layer.conv_states[number], layer.is_conv_states_initialized[number] = state, True
            layer.conv_kernel_size[number] = state.shape[-1]
        else:
            layer.recurrent_states[number], layer.is_recurrent_states_initialized[number] = state, True
        layer.has_previous_state[number] = True
        layer.device, layer.dtype = state.device, state.dtype


def without_window(layer: Any) -> Any:
    """A layer of the cache that keeps the keys and values of all tokens, in the place of one with a window."""
    if type(layer) is DynamicSlidingWindowLayer:
        return DynamicLayer()
    if type(layer) is LinearAttentionAndSlidingWindowAttentionLayer:
        return LinearAttentionAndFullAttentionLayer(number_of_states=layer.number_of_states)
    return layer


def select_states(states: Mapping[int, States], rows: Sequence[int]) -> dict[int, States]:
    """Some rows of the states by layer."""
    return {i: {name: x[rows] for name, x in of_layer.items()} for i, of_layer in states.items()}


def concatenate_states(rows: Sequence[tuple[int, Mapping[int, States]]]) -> dict[int, States]:
    """States by layer of all rows together, of pasts with so many rows; zeros where a past has none yet."""
    known = next((states for _, states in rows if states), {})

    def concatenate(layer: int, name: tuple[str, int], like: Tensor) -> Tensor:
        parts = [states[layer][name] if states else like.new_zeros(count, *like.shape[1:]) for count, states in rows]
        return torch.cat(parts)

    return {i: {name: concatenate(i, name, x) for name, x in of_layer.items()} for i, of_layer in known.items()}

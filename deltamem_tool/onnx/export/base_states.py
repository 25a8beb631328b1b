"""Trace the states of a hybrid model's own layers: those of convolutions and of linear attention.

transformers keeps these states in the layers of the cache, and computes with a few functions of each model's module.
While a model is traced, its cache starts with the inputs of the graph, and other functions replace those of the module.
A convolution or a recurrence becomes one operator of ONNX Runtime or, for other runtimes, a `Conv` or a `Scan`. Padding
leaves every state unchanged, wherever it is. In transformers, that holds only on the left of a first call.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from deltamem_tool._compat import ACT2FN, LinearAttentionLayer
from deltamem_tool.memory.cache import MemoryCache
from deltamem_tool.onnx.contract import Layer
from deltamem_tool.onnx.export.blocks import end_of_text, replace_loops
from deltamem_tool.onnx.export.targets import Target
from deltamem_tool.ops.onnx_scan import linear_attention
from deltamem_tool.ops.portable_scan import portable_linear_attention

L2_EPSILON = 1e-6  # as in transformers
_OPERATOR_ACTIVATIONS = ("silu", "swish")  # activations that ONNX Runtime's convolution supports


class BaseStates:
    """The states of the base model in one call.

    Args:
        valid: bool `[B, T]`, tokens that are not padding.
        in_front: whether each row's valid tokens come first.
        target: target of the graph.
        past: int64 `[B]`, number of tokens of each row before the call.
    """

    def __init__(self, valid: Tensor, in_front: bool, target: Target, past: Tensor) -> None:
        self._valid, self._standard, self._past = valid, target.is_standard, past
        self._order = None if in_front else packed_order(valid)
        self._attend = portable_linear_attention if target.is_standard else linear_attention
        # From the last call of `_append`: its layer, its result, and the two parts of the result.
        self._cache_layer: LinearAttentionLayer = None
        self._joined: tuple[Tensor, Tensor, Tensor] | None = None
        self._scanned = 0  # number of heads of that layer that were scanned

    @contextmanager
    def patch_model(
        self, model: PreTrainedModel, cache: MemoryCache, layers: Sequence[Layer], past: Sequence[Mapping[str, Tensor]]
    ) -> Iterator[None]:
        """Make `model` use the functions below, and `cache` start with the states in `past`, inside the block."""
        end = end_of_text(model)
        for cache_layer, layer, states in zip(cache.layers, layers, past, strict=False):
            if layer.base_states and states:  # copies of other layers get no states
                self._fill(cache_layer, layer, states, end)
        functions: dict[str, Callable[..., Any]] = {
            "causal_conv1d_fn": self._convolve,
            "torch_chunk_gated_delta_rule": self._delta_rule,
            "chunk_kimi_delta_attention": self._delta_rule,
            "mamba2_chunk_scan": self._mamba2,
            "mamba_selective_scan": self._mamba,
        }
        modules = [sys.modules[name] for name in {type(part).__module__ for part in model.modules()}]
        originals = [
            (module, name, vars(module)[name]) for module in modules for name in functions.keys() & vars(module)
        ]
        for module, name, _ in originals:
            setattr(module, name, functions[name])
        try:
            with replace_loops(model), _SlicedWindows():
                yield
        finally:
            for module, name, original in originals:
                setattr(module, name, original)

    def _fill(self, cache_layer: LinearAttentionLayer, layer: Layer, states: Mapping[str, Tensor], end: int) -> None:
        """Start `cache_layer` with `states`. A text with fewer tokens than are kept is preceded by the token `end`."""
        parts = [states[part] for part in layer.base_states]
        recurrent = None if layer.recurrent is None else parts.pop()
        if layer.ngrams is not None:
            tokens = parts[-1]
            is_token = torch.arange(tokens.shape[1]) >= tokens.shape[1] - self._past[:, None]
            parts[-1] = torch.where(is_token, tokens.long(), end)
        cache_layer.conv_states, cache_layer.recurrent_states = dict(enumerate(parts)), {0: recurrent}
        cache_layer.has_previous_state = dict.fromkeys(cache_layer.has_previous_state, True)
        cache_layer.update_conv_state = partial(self._append, cache_layer)
        cache_layer.update_recurrent_state = partial(_replace, cache_layer)

    def _append(self, cache_layer: LinearAttentionLayer, x: Tensor, state_idx: int = 0, **kwargs: Any) -> Tensor:
        """Replace `LinearAttentionLayer.update_conv_state`: append inputs `[B, C, T]` to the kept ones, packed."""
        past = cache_layer.conv_states[state_idx]
        if x.ndim == 2:  # tokens
            joined = torch.cat([past, x], dim=-1)
            cache_layer.conv_states[state_idx] = joined[:, -past.shape[1] :]
            return joined
        new = x.float()
        if self._order is not None:
            new = _columns(new, self._order)
        joined = torch.cat([past, new], dim=-1)
        # The last valid columns; the first column of a row's new tokens is the length of `past`.
        last = self._valid.sum(-1, keepdim=True) + torch.arange(past.shape[-1])
        cache_layer.conv_states[state_idx] = _columns(joined, last)
        self._cache_layer, self._joined, self._scanned = cache_layer, (joined, past, new), 0
        return joined

    def _convolve(
        self, x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, **kwargs: Any
    ) -> Tensor:
        """Replace `causal_conv1d_fn`: convolve the result of `_append`, with weights `[C, K]`.

        Returns:
            The last T outputs, `[B, C, T]`.
        """
        assert self._joined is not None and x is self._joined[0]
        _, past, new = self._joined
        weights = weight.float().unsqueeze(1)
        bias = None if bias is None else bias.float()
        if self._standard:
            output = F.conv1d(x, weights, bias, groups=x.shape[1])
        else:
            fused = activation if activation in _OPERATOR_ACTIVATIONS else None
            output, _ = torch.onnx.ops.symbolic_multi_out(
                "com.microsoft::CausalConvWithState",
                [new, weights, bias, past],
                {"activation": fused or "none"},
                dtypes=[torch.float32, torch.float32],
                shapes=[list(new.shape), list(past.shape)],
                version=1,
            )
            activation = None if fused else activation
        if activation is not None:
            output = ACT2FN[activation](output)
        if self._order is not None:
            output = _columns(output, torch.argsort(self._order))
        return output.to(weight.dtype)

    def _delta_rule(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        g: Tensor,
        beta: Tensor,
        initial_state: Tensor | None = None,
        use_qk_l2norm_in_kernel: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Replace `torch_chunk_gated_delta_rule`, and `chunk_kimi_delta_attention`, whose `g` decays each row.

        `g` is `[B, T, H]` or, with one decay per row, `[B, T, H, R]`. The other arguments are `[B, T, heads, ·]`,
        `beta` is `[B, T, H]`, and the state is `[B, H, R, V]`.
        """
        assert initial_state is not None
        keys = [query.float(), key.float()]
        if use_qk_l2norm_in_kernel:
            keys = [x * torch.rsqrt((x * x).sum(-1, keepdim=True) + L2_EPSILON) for x in keys]
        output, state = self._attend(
            "gated_delta",
            query.shape[2],
            (keys[0] * query.shape[-1] ** -0.5).flatten(2),
            keys[1].flatten(2),
            value.float().flatten(2),
            initial_state,
            self._mask(g.float()).flatten(2),
            self._mask(beta.float()),
        )
        return output.view(value.shape).to(query.dtype), state

    def _mamba2(
        self,
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        dt_bias: Tensor | None = None,
        initial_states: Tensor | None = None,
        dt_softplus: bool = False,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Replace `mamba2_chunk_scan`: input `[B, T, H, P]`, `B` and `C` `[B, T, groups, N]`, state `[B, H, P, N]`."""
        assert initial_states is not None
        x = hidden_states.float()
        dt = _time_steps(dt, dt_bias, dt_softplus)
        if dt_limit != (0.0, math.inf):
            dt = dt.clamp(*dt_limit)
        dt = self._mask(dt)
        output, state = self._attend(
            "gated",
            B.shape[2],
            C.float().flatten(2),
            B.float().flatten(2),
            (x * dt[..., None]).flatten(2),
            initial_states.transpose(2, 3),
            A.float() * dt,
        )
        output = output.view(x.shape)
        return output if D is None else output + D[..., None] * x, state.transpose(2, 3)

    def _mamba(
        self,
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        z: Tensor | None = None,
        delta_bias: Tensor | None = None,
        delta_softplus: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Replace `mamba_selective_scan`: input, `dt` and `z` `[B, I, T]`, `B` and `C` `[B, N, T]`, `A` `[I, N]`.

        It has no argument for the state, which starts from zeros in transformers. Here it starts from the layer's state
        `[B, I, N]`, or `[B, heads, I, N]` if it is called for each head separately.
        """
        state = self._cache_layer.recurrent_states[0]
        state = state if state.ndim == A.ndim + 1 else state[:, self._scanned]
        self._scanned += 1
        bias = None if delta_bias is None else delta_bias[:, None]
        dt = self._mask(_time_steps(dt, bias, delta_softplus).transpose(1, 2))  # [B, T, I]
        output, state = self._attend(
            "gated",
            1,
            C.float().transpose(1, 2),
            B.float().transpose(1, 2),
            hidden_states.float().transpose(1, 2) * dt,
            state.unsqueeze(-1),
            (dt[..., None] * A).flatten(2),
        )
        output = output.transpose(1, 2)
        if D is not None:
            output = output + hidden_states * D[:, None]
        return output if z is None else output * F.silu(z), state.squeeze(-1)

    def _mask(self, x: Tensor) -> Tensor:
        """Return `x` `[B, T, …]` with 0 at padding, where nothing decays and nothing is written."""
        return x * self._valid.view(*self._valid.shape, *[1] * (x.ndim - 2)).to(x.dtype)


class _SlicedWindows(TorchFunctionMode):
    """Make `unfold` stack slices inside the block, because overlapping views cannot be traced for every length."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call `func`, or the replacement of `unfold`."""
        return (_windows if func is Tensor.unfold else func)(*args, **(kwargs or {}))


def _windows(x: Tensor, dimension: int, size: int, step: int) -> Tensor:
    last = x.shape[dimension] - size + 1
    index = [slice(None)] * (dimension % x.ndim)
    return torch.stack([x[(*index, slice(first, first + last, step))] for first in range(size)], dim=-1)


def states_of(cache_layer: LinearAttentionLayer, layer: Layer) -> dict[str, Tensor]:
    """Return the states that a cache layer keeps after a call, by part."""
    states = [*cache_layer.conv_states.values(), cache_layer.recurrent_states[0]]
    return {part: state.float() for part, state in zip(layer.base_states, states, strict=False)}


def packed_order(valid: Tensor) -> Tensor:
    """Return the order in which each row's valid tokens come first, int64 `[B, T]`."""
    tokens = valid.shape[1]
    numbers = torch.arange(tokens)
    return torch.argsort(torch.where(valid, tokens - numbers, -numbers), descending=True)


def _columns(x: Tensor, columns: Tensor) -> Tensor:
    """Return the `columns` `[B, K]` of `x` `[B, C, N]`, as `[B, C, K]`."""
    return x.gather(2, columns.unsqueeze(1).expand(-1, x.shape[1], -1))


def _replace(cache_layer: LinearAttentionLayer, state: Tensor, state_idx: int = 0, **kwargs: Any) -> Tensor:
    """Replace `LinearAttentionLayer.update_recurrent_state`."""
    cache_layer.recurrent_states[state_idx] = state
    return state


def _time_steps(dt: Tensor, bias: Tensor | None, softplus: bool) -> Tensor:
    if bias is not None:
        dt = dt + bias.to(dt.dtype)
    return (F.softplus(dt) if softplus else dt).float()

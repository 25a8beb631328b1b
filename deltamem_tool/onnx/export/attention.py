"""Replace attention by a single operator, if the operator computes the same as the model's attention.

ONNX Runtime's `GroupQueryAttention` takes queries, keys and values of new tokens, appends the keys and values to those
of the past, and attends causally, optionally with a window, a softcap or sinks. The keys and values of each row are at
the front of their buffer, `[B, kv_heads, N, width]`, in order and without padding.

Whether a model's attention is the same is found by trying: the model runs once as is, and once with the equation below
in place of its attention. While the model is traced, one node stands for the equation, and another for rotary position
embeddings; `attention_nodes` turns them into the operator.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel

from deltamem_tool._compat import DummyLayer, DynamicLayer, LinearAttentionLayer, use_attention
from deltamem_tool.memory.cache import MemoryCache
from deltamem_tool.onnx import contract
from deltamem_tool.onnx.export.layers import DOMAIN

ATTENTION, ROTARY = "Attention", "Rotary"  # node types that `attention_nodes` replaces
HALVES, INTERLEAVED = 0, 1  # how rotary embeddings pair numbers: across the halves of a head, or neighbours

_NAME = "deltamem_onnx"  # name of this attention implementation in transformers
_PROBE_TOKENS = 12
_PROBE_WINDOW = 4  # longer windows and chunks are shortened to this in the trial, so that it notices them
_PROBE_TOLERANCE = 1e-4  # relative, between logits of the model and of the equation, in float32
_HALF_TOLERANCE = 3e-2  # in half precision
_HEAD_MULTIPLE = 8  # the operator needs a head width that is a multiple of this

_current: FusedAttention | None = None


@dataclass(frozen=True)
class Lengths:
    """The lengths of the rows of a call.

    Args:
        past: number of tokens of each row before the call, int64 `[B]`.
        last: index of each row's last key after the call if all its tokens are valid, int32 `[B]`.
        total: number of columns that keys and values must have, int32 scalar.
    """

    past: Tensor
    last: Tensor
    total: Tensor


class FusedAttention:
    """Run a model with the equation in place of its attention, or trace it with a node for it.

    Args:
        lengths: lengths of the rows of the call.
    """

    def __init__(self, lengths: Lengths) -> None:
        self.lengths = lengths
        self.layers: dict[int, FusedLayer] = {}
        self._may_rest: set[int] = set()  # layers that may have no attention

    @contextmanager
    def patch_model(
        self, model: PreTrainedModel, cache: MemoryCache, past: Sequence[Mapping[str, Tensor]]
    ) -> Iterator[None]:
        """Make calls of `model` with `cache` use the equation with the keys and values of `past`, inside the block."""
        global _current
        kinds: list[Any] = [*cache.layers, *[None] * (len(past) - len(cache.layers))]
        attending = [isinstance(kind, DynamicLayer) or not isinstance(kind, LinearAttentionLayer) for kind in kinds]
        self.layers = {
            i: (FusedHybridLayer if isinstance(kind, LinearAttentionLayer) else FusedLayer)(
                one.get(contract.KEY), one.get(contract.VALUE)
            )
            for i, (kind, one) in enumerate(zip(kinds, past, strict=True))
            if attending[i]
        }
        cache.layers = [self.layers.get(i, kind) for i, kind in enumerate(kinds)]
        self._may_rest = {i for i, kind in enumerate(kinds) if isinstance(kind, DummyLayer)}
        _current, before = self, _current
        try:
            with use_attention(model, _NAME):
                yield
        finally:
            _current = before

    @property
    def all_attended(self) -> bool:
        """Whether every layer with keys has passed them to the equation."""
        return all(layer.keys is not None for i, layer in self.layers.items() if i not in self._may_rest)


class FusedLayer(DynamicLayer):  # type: ignore[misc]  # of transformers
    """A cache layer whose keys and values are appended by the operator."""

    def __init__(self, keys: Tensor | None, values: Tensor | None) -> None:
        super().__init__()
        self.past = (keys, values)
        self.new: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return the new keys and values, which the attention appends."""
        self.is_initialized, self.new = True, (key_states, value_states)
        return key_states, value_states

    def get_seq_length(self) -> int:
        """Return 0, because positions are passed explicitly."""
        return 0


class FusedHybridLayer(LinearAttentionLayer, FusedLayer):  # type: ignore[misc]  # of transformers
    """A `FusedLayer` that also keeps the states of the base model."""

    def __init__(self, keys: Tensor | None, values: Tensor | None) -> None:
        FusedLayer.__init__(self, keys, values)
        LinearAttentionLayer.__init__(self)


def can_fuse(model: PreTrainedModel, cache_layers: int) -> bool:
    """Return whether the operator computes the attention of every layer of `model`."""
    return fusion_obstacle(model, cache_layers) is None


def fusion_obstacle(model: PreTrainedModel, cache_layers: int) -> str | None:
    """Return why the operator does not compute the attention of `model`; None if it does."""
    tokens = _PROBE_TOKENS
    ids = torch.arange(2 * tokens, device=model.device).view(2, tokens) % _PROBE_TOKENS
    positions = torch.arange(tokens, device=model.device).expand(2, -1)
    past = torch.zeros(2, dtype=torch.long, device=model.device)
    lengths = Lengths(past, (past + tokens - 1).int(), torch.tensor(tokens, dtype=torch.int32))
    with torch.no_grad(), _short_windows(model):
        expected = model(input_ids=ids, cache=MemoryCache(model), position_ids=positions).logits.float()
        cache = MemoryCache(model)
        fused = FusedAttention(lengths)
        try:
            with fused.patch_model(model, cache, [{}] * cache_layers):
                actual = model(input_ids=ids, cache=cache, position_ids=positions).logits.float()
        except _NotFusedError as error:
            return str(error)
        except Exception as error:  # a model with its own attention can raise anything without its mask
            return f"it is the model's own, and fails without a mask ({type(error).__name__})"
    if not fused.all_attended:
        return "it is the model's own"
    allowed = _PROBE_TOLERANCE if model.dtype == torch.float32 else _HALF_TOLERANCE
    difference = (actual - expected).abs().max()
    return None if difference <= allowed * expected.abs().max() else "it computes something else"


@contextmanager
def _short_windows(model: PreTrainedModel) -> Iterator[None]:
    """Shorten windows and chunks of `model` inside the block; some models apply them only in their masks."""
    parts = list(model.modules())
    configs = {id(part.config): part.config for part in parts if isinstance(vars(part).get("config"), PretrainedConfig)}
    changed = [
        (holder, name, size)
        for holder in (*configs.values(), *parts)
        for name, size in vars(holder).items()
        if ("window" in name or "chunk" in name) and type(size) is int and size > _PROBE_WINDOW
    ]
    try:
        for holder, name, _ in changed:
            setattr(holder, name, _PROBE_WINDOW)
        yield
    finally:
        for holder, name, size in changed:
            setattr(holder, name, size)


class _NotFusedError(Exception):
    """A layer's attention is not the operator's."""


def _attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Return attention `[B, T, H, D]` of queries `[B, H, T, D]` and new keys and values `[B, K, T, D]`."""
    assert _current is not None
    index = getattr(module, "layer_idx", None)
    heads, kv_heads, width = query.shape[1], key.shape[1], query.shape[-1]
    if not key.shape[-1] == value.shape[-1] == width:
        raise _NotFusedError("keys and values differ in width")
    if heads % kv_heads or width % _HEAD_MULTIPLE:
        raise _NotFusedError(f"{heads} heads with {kv_heads} heads of keys, {width} wide")
    if attention_mask is not None:
        raise _NotFusedError("it has a mask of the model's own")
    if index is None or not getattr(module, "is_causal", True):
        raise _NotFusedError("it is not causal, or does not belong to a layer")
    layer = _current.layers[index]
    if not layer.is_initialized:
        raise _NotFusedError("layers share the keys of others")
    scale = width**-0.5 if scaling is None else float(scaling)
    settings: dict[str, Any] = {"scale": scale, "window": sliding_window or 0, "softcap": float(softcap or 0)}
    if torch.compiler.is_exporting():
        keys, values = layer.past
        assert keys is not None and values is not None
        sinks = [] if s_aux is None else [s_aux]
        batch, tokens = query.shape[0], query.shape[2]
        output, layer.keys, layer.values = torch.onnx.ops.symbolic_multi_out(
            f"{DOMAIN}::{ATTENTION}",
            [query, key, value, keys, values, _current.lengths.last, _current.lengths.total, *sinks],
            {"heads": heads, "kv_heads": kv_heads, "width": width, **settings},
            dtypes=[query.dtype, keys.dtype, values.dtype],
            shapes=[[batch, tokens, heads * width], list(keys.shape), list(values.shape)],
            version=1,
        )
        return output.view(batch, tokens, heads, width), None
    if layer.keys is not None:
        raise _NotFusedError("a layer attends several times")
    assert layer.new is not None
    if not all(map(torch.equal, (key, value), layer.new)):
        raise _NotFusedError("it changes keys or values after they are stored in the cache")
    layer.keys, layer.values = key, value
    return attention(query, key, value, sinks=s_aux, **settings).transpose(1, 2).contiguous(), None


def attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, window: int, softcap: float, sinks: Tensor | None
) -> Tensor:
    """Compute the equation for a text without a past: query `[B, H, T, D]`, keys and values `[B, K, T, D]`."""
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, 1).float() for x in (key, value))
    scores = query.float() @ key.transpose(2, 3) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    distance = torch.arange(scores.shape[-1], device=scores.device)
    distance = distance[:, None] - distance
    seen = (distance >= 0) & (distance < window) if window else distance >= 0
    scores = scores.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    weights = scores.softmax(-1)[..., : key.shape[2]]
    return (weights @ value).to(query.dtype)


AttentionInterface.register(_NAME, _attend)


@contextmanager
def replace_rotary(model: PreTrainedModel) -> Iterator[None]:
    """Replace the rotary embeddings of `model` by a node inside the block, if they are of a known kind."""
    name = "apply_rotary_pos_emb"
    modules = {type(part).__module__ for part in model.modules()}
    patched = {}
    for module in (sys.modules[module] for module in modules):
        original = vars(module).get(name)
        pairings = [] if original is None else [_pairing(original, width) for width in (8, 12)]  # a head, or its part
        if original is not None and any(pairings):
            patched[module] = original
            setattr(module, name, partial(_rotate, original, pairings))
    try:
        yield
    finally:
        for module, original in patched.items():
            setattr(module, name, original)


def _rotate(
    original: Callable[..., tuple[Tensor, Tensor]],
    pairings: Sequence[tuple[int, int] | None],
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    width = cos.shape[-1]
    pairing = pairings[q.shape[-1] != width]
    if not torch.compiler.is_exporting() or args or kwargs or pairing is None:
        return original(q, k, cos, sin, *args, **kwargs)
    of_numbers, of_angles = pairing
    half = slice(0, width // 2) if of_angles == HALVES else slice(None, None, 2)
    cos, sin = cos[..., half], sin[..., half]

    def node(x: Tensor) -> Tensor:
        turned = x[..., :width]
        turned = torch.onnx.ops.symbolic(
            f"{DOMAIN}::{ROTARY}",
            [turned, cos, sin],
            {"interleaved": of_numbers},
            dtype=x.dtype,
            shape=list(turned.shape),
            version=1,
        )
        return turned if x.shape[-1] == width else torch.cat([turned, x[..., width:]], -1)

    return node(q), node(k)


def _pairing(rotate: Callable[..., tuple[Tensor, Tensor]], width: int) -> tuple[int, int] | None:
    """Return which numbers `rotate` pairs, and how it takes their angles; None if it does something else.

    It is tried on heads of `width` numbers, of which it rotates the first eight.
    """
    random = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, heads, 3, width, generator=random, dtype=torch.float32) for heads in (2, 1))
    angles = torch.randn(1, 3, 4, generator=random, dtype=torch.float32)
    laid_out = {HALVES: angles.repeat(1, 1, 2), INTERLEAVED: angles.repeat_interleave(2, -1)}
    for of_angles, both in laid_out.items():
        try:
            rotated = rotate(q, k, both.cos(), both.sin())
        except (TypeError, RuntimeError, IndexError, ValueError):  # it takes something else
            return None
        if not isinstance(rotated, tuple) or [x.shape for x in rotated] != [q.shape, k.shape]:
            return None
        for of_numbers in laid_out:
            pairs = zip(rotated, (q, k), strict=True)
            if all(torch.allclose(x, _apply_rotary(y, angles, of_numbers), atol=1e-5) for x, y in pairs):
                return of_numbers, of_angles
    return None


def _apply_rotary(x: Tensor, angles: Tensor, pairing: int) -> Tensor:
    """Rotate the first numbers of each head of `x` `[B, H, T, D]` by `angles` `[B, T, R / 2]`."""
    width = 2 * angles.shape[-1]
    x, rest = x[..., :width], x[..., width:]
    first, second = x.chunk(2, -1) if pairing == HALVES else (x[..., ::2], x[..., 1::2])
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    turned = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat([torch.cat(turned, -1) if pairing == HALVES else torch.stack(turned, -1).flatten(-2), rest], -1)

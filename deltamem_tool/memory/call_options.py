"""Call a model on a cache with given keys and values, in PyTorch and while a graph is traced."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deltamem_tool._compat import (
    DynamicLayer,
    LinearAttentionLayer,
    StaticLayer,
    attention_implementation,
    cache_argument,
)
from deltamem_tool.base_model.limits import Limits
from deltamem_tool.base_model.placement import input_device
from deltamem_tool.errors import ExportError
from deltamem_tool.memory.attachment import hf_model
from deltamem_tool.memory.cache import MemoryCache

_PADDING_TOLERANCE = 1e-2  # of logits, by their size: more than half precision's rounding mostly is


class CallOptions:
    """Options for calling `model`, in a graph and in PyTorch.

    Args:
        model: a model with a memory.
        logits: "last" or "all".
        padded_right: whether "last" means each row's last token that is not padding, instead of the last column.

    Raises:
        ExportError: padding is on the right, and the model does not say which layer computes its logits.
    """

    def __init__(self, model: PreTrainedModel, logits: str, padded_right: bool = False) -> None:
        self._last = logits == "last" and not padded_right
        inside = hf_model(model)  # a wrapper's signature, PEFT's or torch.compile's, names nothing
        forward = inside.forward
        parameters = inspect.signature(forward).parameters
        self._cache = cache_argument(forward)  # also of a model that has no memory
        self._cuts = "logits_to_keep" in parameters
        self.keeps_all = logits == "all"
        self._padded_right = logits == "last" and padded_right
        if self._padded_right and _head_of(model) is None:
            raise ExportError(
                f"{type(model).__name__} does not say which layer computes its logits.",
                "Without it, logits cannot be limited to each row's last token, as padding on the right requires.",
                'Export the logits of all positions (logits="all").',
            )
        self.takes_positions = "position_ids" in parameters  # if not, the model itself counts, with or without padding
        self._starts_over = _starts_over(model)
        self._first_position = _first_position(inside) if self.takes_positions else None  # without compiling for it
        positions = Limits.from_config(model.config).positions
        self.positions = None if positions is None else positions - (self._first_position or 0)  # tokens of a context

    def logits(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        attention_mask: Tensor,
        cache: MemoryCache,
        columns: Tensor | None = None,
    ) -> Tensor:
        """Return the logits as the graph does, `[B, 1, V]` or `[B, T, V]`.

        Args:
            model: the model.
            input_ids: `[B, T]`.
            attention_mask: `[B, P + T]`.
            cache: keys, values and memory before the tokens.
            columns: int64 `[T]`, the positions of the tokens in the mask; None for its last ones.
        """
        if self._starts_over and input_ids.shape[1] > 1 and _continues(cache):
            return self._one_by_one(model, input_ids, attention_mask, cache)
        kwargs: dict[str, Any] = {self._cache: cache}
        if self._first_position is not None:
            kwargs["position_ids"] = self._first_position + _positions(attention_mask, input_ids.shape[1], columns)
        if self._cuts:
            kwargs["logits_to_keep"] = 1 if self._last else 0  # 0 is all, for transformers
        mask = attention_mask if columns is None else _mask_columns(model, attention_mask, columns)
        position = last_valid(attention_mask, input_ids.shape[1])[:, None] if self._padded_right else None
        with _cut(_head_of(model), position):
            logits: Tensor = model(input_ids=input_ids, attention_mask=mask, use_cache=True, **kwargs).logits
        return logits if self._cuts or not self._last else logits[:, -1:]

    def _one_by_one(
        self, model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, cache: MemoryCache
    ) -> Tensor:
        """Do the same as `logits` with one call per token."""
        write, tokens = cache.write, input_ids.shape[1]
        of_tokens = []
        for token in range(tokens):
            if isinstance(write, Tensor):
                cache.write = write[:, token : token + 1]
            mask = attention_mask[:, : attention_mask.shape[1] - tokens + token + 1]
            of_tokens.append(self.logits(model, input_ids[:, token : token + 1], mask, cache))
        cache.write = write
        return of_tokens[-1] if self._last else torch.cat(of_tokens, dim=1)

    @torch.no_grad()
    def loses_padding(self, model: PreTrainedModel) -> bool:
        """Return whether `model`, which takes positions, treats padding of an earlier call like tokens.

        From the second call on, GIT shifts its mask by the tokens of a picture, whether or not there is one.
        """
        if not self.takes_positions:
            return False
        ids = torch.tensor([[3, 3, 4, 5]], device=input_device(model))
        logits = []
        for padding in (0, 1):
            cache, text = MemoryCache(model), ids[:, 1 - padding :]
            mask = torch.ones_like(text)
            mask[:, :padding] = 0
            self.logits(model, text[:, :-1], mask[:, :-1], cache)
            logits.append(self.logits(model, text[:, -1:], mask, cache).float())
        alone, padded = logits
        return bool((padded - alone).abs().max() > _PADDING_TOLERANCE * alone.abs().max())

    @property
    def counts_positions(self) -> bool:
        """Whether the model takes positions, and by default counts them in the same way as here."""
        return self._first_position is not None

    def packed_logits(
        self, model: PreTrainedModel, input_ids: Tensor, positions: Tensor, cache: MemoryCache, kept: Tensor
    ) -> Tensor:
        """Return logits `[B, K, V]` of a call whose attention needs no mask.

        Args:
            model: the model.
            input_ids: `[B, T]`.
            positions: int64 `[B, T]`, from zero.
            cache: keys, values and memory before the tokens.
            kept: int64 `[B, K]`, the tokens whose logits are returned.
        """
        kwargs: dict[str, Any] = {self._cache: cache, "position_ids": (self._first_position or 0) + positions}
        if self._cuts:
            kwargs["logits_to_keep"] = 0  # all
        head = _head_of(model)
        with _cut(head, kept):
            logits: Tensor = model(input_ids=input_ids, use_cache=True, **kwargs).logits
        return logits if head is not None else logits.gather(1, kept[..., None].expand(-1, -1, logits.shape[-1]))


def last_valid(attention_mask: Tensor, tokens: int) -> Tensor:
    """Return the index of each row's last token that is not padding, int64 `[B]`, among the last tokens; else 0."""
    return (attention_mask[:, -tokens:] * torch.arange(tokens, device=attention_mask.device)).amax(-1)


def _starts_over(model: PreTrainedModel) -> bool:
    """Return whether several tokens at once always begin a text in `model`, because its Mamba ignores the state."""
    modules = {type(part).__module__ for part in model.modules()}
    return any("mamba_selective_scan" in vars(sys.modules[module]) for module in modules)


def _continues(cache: MemoryCache) -> bool:
    """Return whether layers of `cache` have states of earlier tokens, which are values and not inputs of a graph."""
    if torch.compiler.is_exporting():
        return False
    return any(isinstance(x, LinearAttentionLayer) and any(x.has_previous_state.values()) for x in cache.layers)


def _head_of(model: PreTrainedModel) -> nn.Module | None:
    """Return the layer that computes the logits, if the model names it."""
    head: nn.Module | None = model.get_output_embeddings()  # type: ignore[no-untyped-call]  # of transformers
    return head


@contextmanager
def _cut(head: nn.Module | None, position: Tensor | None) -> Iterator[None]:
    """Let `head` see the positions `[B, K]` of each row; all of them where it is None."""
    if head is None or position is None:
        yield
        return

    def cut(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        index = position[..., None].expand(-1, -1, args[0].shape[-1]).to(args[0].device)
        return (args[0].gather(1, index), *args[1:])

    handle = head.register_forward_pre_hook(cut)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def _first_position(model: PreTrainedModel) -> int | None:
    """Find where `model` begins to count: at zero, or, as RoBERTa does, after the id of its padding.

    None if it does neither: then it counts by itself.
    """
    device = input_device(model)
    ids = torch.tensor([[3, 4, 5]], device=device)
    expected = model(input_ids=ids, cache=MemoryCache(model)).logits
    padding = getattr(model.config.get_text_config(decoder=True), "pad_token_id", None)
    for first in (0, (padding or 0) + 1):
        positions = first + torch.arange(3, device=device)[None]
        if torch.allclose(model(ids, position_ids=positions, cache=MemoryCache(model)).logits, expected, atol=1e-5):
            return first
    return None


def _positions(attention_mask: Tensor, tokens: int, columns: Tensor | None) -> Tensor:
    """Return the positions `[B, T]` of the tokens, counted without padding, as in `generate`."""
    positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    return positions[:, -tokens:] if columns is None else positions.index_select(1, columns)


def _mask_columns(model: PreTrainedModel, attention_mask: Tensor, columns: Tensor) -> Tensor:
    """Return the columns that the tokens in `columns` attend to, `[B, 1, T, N]`, as a mask that attention accepts.

    What transformers makes of the 2-D mask gathers it by indices, which a CUDA graph cannot replay.
    """
    causal = torch.arange(attention_mask.shape[1], device=columns.device) <= columns[:, None]
    seen = attention_mask.bool()[:, None, None, :] & causal
    if attention_implementation(model.config) == "sdpa":
        return seen
    return (~seen).to(model.dtype) * torch.finfo(model.dtype).min


def fill_layer(layer: DynamicLayer, key: Tensor, value: Tensor) -> None:
    """Do what `DynamicLayer.update` does to a new layer, without concatenating the past to an empty tensor."""
    layer.keys, layer.values, layer.is_initialized = key, value, True
    layer.dtype, layer.device = key.dtype, key.device


def fill_static_layer(layer: StaticLayer, key: Tensor, value: Tensor, length: Tensor) -> None:
    """Do what `fill_layer` does for a static layer, which changes the tensors that it is given.

    Args:
        layer: a new layer of a static cache.
        key: `[B, H, N, D]`, with room for N tokens.
        value: `[B, H, N, D]`.
        length: int64 scalar, the number of tokens in it.
    """
    layer.keys, layer.values, layer.is_initialized = key, value, True
    layer.dtype, layer.device = key.dtype, key.device
    layer.batch_size, layer.num_heads, layer.k_head_dim = key.shape[0], key.shape[1], key.shape[3]
    layer.v_head_dim, layer.cumulative_length = value.shape[3], length

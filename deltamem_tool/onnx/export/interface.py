"""Derive the interface of a model's graph, and reject models that cannot be exported."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from deltamem_tool._compat import (
    DummyLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
    StaticLayer,
)
from deltamem_tool.errors import ExportError
from deltamem_tool.memory.adapter import DeltaMemAdapter
from deltamem_tool.memory.cache import MemoryCache
from deltamem_tool.memory.call_options import CallOptions
from deltamem_tool.onnx import contract
from deltamem_tool.onnx.contract import Interface, Layer
from deltamem_tool.onnx.export.attention import can_fuse
from deltamem_tool.onnx.export.blocks import has_blocks
from deltamem_tool.onnx.export.cache_layers import can_carry, columns_of, counts_columns
from deltamem_tool.onnx.export.targets import Target


def interface_of(
    model: PreTrainedModel,
    adapter: DeltaMemAdapter,
    options: CallOptions,
    logits: str,
    target: Target,
    max_length: int = 0,
) -> Interface:
    """Derive the inputs and outputs of the graph of `model` for `target` by running one token.

    Raises:
        ExportError: the model keeps values between calls that a graph cannot carry, or a fixed length `max_length` is
            requested and it does not keep the keys and values of every token.
    """
    if logits not in contract.LOGITS:
        raise ExportError(f"Invalid logits {logits!r}.", "", f"Choose one of {', '.join(contract.LOGITS)}.")
    cache = MemoryCache(model)
    tokens = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    with torch.no_grad():
        vocab_size = model(input_ids=tokens, cache=cache).logits.shape[-1]
    _check_caches(model, cache)
    if any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache.layers):
        _check_hybrid(model, target, max_length)
    if any(map(can_carry, cache.layers)):
        _check_columns(model, target, max_length)
    packed = target.fusions is not None and options.counts_positions and can_fuse(model, len(cache.layers))
    if max_length:
        _check_fixed_length(model, target, max_length, packed)
    if options.positions is not None and max_length > options.positions:
        raise ExportError(
            f"A maximum length of {max_length} tokens is too long.",
            f"The model has {options.positions} positions.",
            "Choose a smaller one.",
        )
    states, segment = adapter.memory_shape.layers, adapter.memory_shape.segment_width
    layers = []
    for i in range(max(len(cache.layers), *(index + 1 for index in states))):
        # A layer that reads the keys of another layer keeps none itself, and the cache may have no entry for it.
        cache_layer = cache.layers[i] if i < len(cache.layers) else None
        key, value = (_heads_and_width(getattr(cache_layer, name, None)) for name in ("keys", "values"))
        columns = tuple((part, x.shape[-1]) for part, x in columns_of(cache_layer).items())
        layers.append(
            Layer(key, value, cast(Any, states.get(i)), *_base_states(cache_layer), columns, _ngrams(cache_layer))
        )
    own_states = any(layer.base_states for layer in layers)  # padding changes them in PyTorch, but not in the graph
    loses_padding = not (packed or own_states or max_length or target.genai) and options.loses_padding(model)
    return Interface(
        packed=packed,
        logits=logits,
        vocab_size=vocab_size,
        dtype=dtype_name(model.dtype),
        segment=segment,
        layers=tuple(layers),
        genai=target.genai,
        max_length=max_length,
        positions=options.positions or 0,
        row_by_row=not packed and (has_blocks(model) or any(map(counts_columns, cache.layers)) or loses_padding),
    )


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of `dtype` in the contract."""
    return str(dtype).removeprefix("torch.")


def _heads_and_width(cached: Tensor | None) -> tuple[int, int] | None:
    return None if cached is None else (cached.shape[1], cached.shape[3])


def _base_states(cache_layer: Any) -> tuple[tuple[tuple[int, int], ...], tuple[int, ...] | None]:
    """Return the sizes of a cache layer's states of convolutions and of a recurrence; see `Layer`."""
    if not isinstance(cache_layer, LinearAttentionCacheLayerMixin):
        return (), None
    # transformers keeps one more column than later outputs depend on.
    states = {0: cache_layer.conv_states[0]} if _ngrams(cache_layer) else cache_layer.conv_states
    convolutions = tuple((x.shape[1], x.shape[2] - 1) for x in states.values() if x is not None)
    recurrent = cache_layer.recurrent_states[0]
    return convolutions, None if recurrent is None else tuple(recurrent.shape[1:])


def _ngrams(cache_layer: Any) -> tuple[int, int, int] | None:
    """Return the sizes of a cache layer's states of n-gram embeddings; see `Layer`."""
    states = list(cache_layer.conv_states.values()) if isinstance(cache_layer, LinearAttentionCacheLayerMixin) else []
    if not states or states[-1] is None or states[-1].ndim != 2:
        return None
    *_, convolution, tokens = states
    return convolution.shape[1], convolution.shape[2], tokens.shape[1]


def _check_hybrid(model: PreTrainedModel, target: Target, max_length: int) -> None:
    """Check the options of an export of a hybrid model, whose layers keep states of their own.

    Raises:
        ExportError: a fixed length is requested, or the target's runtime does not support such states.
    """
    if max_length:
        raise ExportError(
            f"{type(model).__name__} cannot be exported with a fixed length.",
            "Its layers of linear attention or convolutions keep states, whose size is fixed already.",
            "Leave --max-length out. Keys and values of its attention layers are written in place in any case.",
        )
    if target.genai:
        raise ExportError(
            f"{type(model).__name__} cannot be exported for the target {target.name}.",
            "onnxruntime-genai needs one shape for all layers' states, and the memory's differs from the model's own.",
            "Choose another target, such as cpu.",
        )


def _check_columns(model: PreTrainedModel, target: Target, max_length: int) -> None:
    """Check the options of an export of a model that keeps more per token than keys and values.

    Raises:
        ExportError: a fixed length is requested, or the target's runtime only supports keys and values.
    """
    if max_length or target.genai:
        raise ExportError(
            f"{type(model).__name__} cannot be exported " + ("with a fixed length." if max_length else "for genai."),
            "Besides keys and values, its layers keep more for each token, such as the keys of an indexer, which "
            + ("grow with the text." if max_length else "onnxruntime-genai does not feed."),
            "Leave --max-length out." if max_length else "Choose another target, such as cpu.",
        )


def _check_caches(model: PreTrainedModel, cache: MemoryCache) -> None:
    """Check that the graph can carry what the layers keep.

    Raises:
        ExportError: a layer of `cache` holds something other than the keys and values of every past token.
    """
    carried = (
        *(DynamicLayer, DynamicSlidingWindowLayer, DummyLayer, LinearAttentionLayer),
        *(LinearAttentionAndFullAttentionLayer, LinearAttentionAndSlidingWindowAttentionLayer),
    )
    for layer in cache.layers:
        if type(layer) not in carried and not can_carry(layer):
            raise ExportError(
                f"{type(model).__name__} cannot be exported yet.",
                f"Besides keys and values, its layers keep {type(layer).__name__}, which the graph does not carry.",
                "Run it in PyTorch, or export a model that only has attention layers.",
            )


def _check_fixed_length(model: PreTrainedModel, target: Target, max_length: int, packed: bool) -> None:
    """Check that the graph can have keys and values of a fixed length.

    Raises:
        ExportError: `max_length` is too small, the target's runtime has its own buffers, or keys and values are not
            packed and a static cache layer of the model is a rolling window.
    """
    if max_length < contract.MIN_LENGTH:
        raise ExportError(
            f"A maximum length of {max_length} tokens is too short.",
            f"The graph is compared with PyTorch on a conversation of {contract.MIN_LENGTH} tokens, which must fit.",
            "Choose a larger --max-length.",
        )
    if target.genai:
        raise ExportError(
            f"The target {target.name} does not support --max-length.",
            "Its runtime feeds keys and values that grow.",
            "Leave one of the two out.",
        )
    layers = [] if packed else MemoryCache(model, max_length=max_length).layers
    other = {type(layer).__name__ for layer in layers if type(layer) not in (StaticLayer, DummyLayer)}
    if other:
        raise ExportError(
            f"{type(model).__name__} cannot be exported with a fixed length.",
            f"Some of its layers keep only a window of the last tokens ({', '.join(sorted(other))}).",
            "Leave --max-length out: keys and values then grow.",
        )

"""Trace cache layers that keep more for every token than keys and values.

These are the keys of an indexer, which selects the tokens that attention sees, and the inputs of DeepSeek-V4's
compression. transformers keeps the compressed windows and the tokens of the open one. A graph keeps every token and
compresses all of them again in every call.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deltamem_tool._compat import DynamicIndexedLayer, DynamicLayer
from deltamem_tool.chat.torch_states import without_window
from deltamem_tool.onnx import contract

_KEYS = "idx_keys"  # attribute in which MiniMax-M3's cache layer keeps the keys of its indexer
_COMPRESS = "store_compression_weights"  # method of DeepSeek-V4's cache layers


class CompressedLayer(DynamicLayer):  # type: ignore[misc]  # of transformers
    """A replacement for DeepSeek-V4's cache layers.

    Args:
        compress_rate: number of tokens in a window.

    Attributes:
        inputs: input of the compressors for each token, `[B, 1, P, width]` by part.
    """

    def __init__(self, compress_rate: int) -> None:
        super().__init__()
        self.compress_rate = compress_rate
        self.inputs: dict[str, Tensor] = {}

    def store_compression_weights(self, name: str, kv: Tensor, gate: Tensor) -> tuple[Tensor, Tensor, int]:
        """Return all windows `[B, W * rate, width]`, plus two after the last whole one that no token sees yet."""
        windows = []
        for kind, new in (("kv", kv), ("gate", gate)):
            part = f"{name}_{kind}"
            every = torch.cat([self.inputs[part].squeeze(1), new], dim=1) if part in self.inputs else new
            self.inputs[part] = every.unsqueeze(1)
            tokens = every.shape[1]
            # Use more than one window: what is traced for several windows is also valid for one.
            windows.append(F.pad(every, (0, 0, 0, (tokens // self.compress_rate + 2) * self.compress_rate - tokens)))
        return windows[0], windows[1], 0

    def update_compressor_states(self, name: str, compressed: Tensor) -> Tensor:
        """Return `compressed` as is: it has all windows, so none is kept."""
        return compressed

    def update_overlap_state(self, *args: Any) -> tuple[None, None]:
        """Return nothing: no window precedes the first one."""
        return None, None


def can_carry(cache_layer: Any) -> bool:
    """Return whether the further values of a cache layer, besides keys and values, can be carried as columns."""
    return (
        isinstance(cache_layer, DynamicIndexedLayer) or hasattr(cache_layer, _KEYS) or hasattr(cache_layer, _COMPRESS)
    )


def counts_columns(cache_layer: Any) -> bool:
    """Return whether the base uses a layer's columns as positions, so that padding would count."""
    return hasattr(cache_layer, _KEYS) or hasattr(cache_layer, _COMPRESS) or getattr(cache_layer, "is_sliding", False)


def traced_layer(cache_layer: Any) -> Any:
    """Return the replacement for a new cache layer, which keeps every column."""
    return (
        CompressedLayer(cache_layer.compress_rate) if hasattr(cache_layer, _COMPRESS) else without_window(cache_layer)
    )


def columns_of(cache_layer: Any) -> Mapping[str, Tensor]:
    """Return the further values that a cache layer keeps for each token, `[B, 1, P, width]` by part."""
    if isinstance(cache_layer, CompressedLayer):
        return cache_layer.inputs
    if hasattr(cache_layer, _COMPRESS):
        kinds = {"kv": cache_layer.buffer_kv, "gate": cache_layer.buffer_gate}
        return {f"{name}_{kind}": kinds[kind][name].unsqueeze(1) for name in cache_layer.buffer_kv for kind in kinds}
    keys = getattr(cache_layer, _KEYS, None)
    if isinstance(cache_layer, DynamicIndexedLayer) and cache_layer.indexer_keys is not None:
        keys = cache_layer.indexer_keys.unsqueeze(1)
    return {} if keys is None else {contract.INDEXER_KEY: keys}


def fill_columns(cache_layer: Any, past: Mapping[str, Tensor]) -> None:
    """Start a cache layer with values from `columns_of`."""
    if isinstance(cache_layer, CompressedLayer):
        cache_layer.inputs = {part: past[part] for part in contract.COLUMNS if part in past}
    elif contract.INDEXER_KEY in past and isinstance(cache_layer, DynamicIndexedLayer):
        cache_layer.indexer_keys, cache_layer.is_indexer_initialized = past[contract.INDEXER_KEY].squeeze(1), True
        # Qwen4 rotates the keys by these positions, which are the columns of rows without padding, for time, height and
        # width alike.
        cache_layer.indexer_position_ids = torch.arange(cache_layer.indexer_keys.shape[1]).expand(
            3, cache_layer.indexer_keys.shape[0], -1
        )
    elif contract.INDEXER_KEY in past:
        setattr(cache_layer, _KEYS, past[contract.INDEXER_KEY])

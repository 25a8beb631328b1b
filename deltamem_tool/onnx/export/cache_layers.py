"""Trace cache layers that keep more for every token than keys and values.

These are the keys of an indexer, which selects the tokens that attention sees, and the inputs of DeepSeek-V4's
compression. transformers keeps the compressed windows and the tokens of the open one. A graph keeps every token, and
compresses them anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deltamem_tool._compat import DynamicIndexedLayer, DynamicLayer
from deltamem_tool.chat.torch_states import keeping_all
from deltamem_tool.onnx import contract

_KEYS = "idx_keys"  # where MiniMax-M3's own kind of layer keeps those of its indexer
_COMPRESS = "store_compression_weights"  # a method of DeepSeek-V4's


class CompressedLayer(DynamicLayer):  # type: ignore[misc]  # of transformers
    """In the place of DeepSeek-V4's layers.

    Args:
        compress_rate: tokens of a window.

    Attributes:
        given: what the compressors were given of each token, `[B, 1, P, width]` by part.
    """

    def __init__(self, compress_rate: int) -> None:
        super().__init__()
        self.compress_rate = compress_rate
        self.given: dict[str, Tensor] = {}

    def store_compression_weights(self, name: str, kv: Tensor, gate: Tensor) -> tuple[Tensor, Tensor, int]:
        """All windows `[B, W * rate, width]`, behind the last whole one two more, which no token sees yet."""
        windows = []
        for kind, new in (("kv", kv), ("gate", gate)):
            part = f"{name}_{kind}"
            every = torch.cat([self.given[part].squeeze(1), new], dim=1) if part in self.given else new
            self.given[part] = every.unsqueeze(1)
            tokens = every.shape[1]
            # More than one: what a model computes of several windows is traced, and holds for one.
            windows.append(F.pad(every, (0, 0, 0, (tokens // self.compress_rate + 2) * self.compress_rate - tokens)))
        return windows[0], windows[1], 0

    def update_compressor_states(self, name: str, compressed: Tensor) -> Tensor:
        """Nothing is kept: they are all."""
        return compressed

    def update_overlap_state(self, *args: Any) -> tuple[None, None]:
        """No window is before the first one."""
        return None, None


def can_carry(held: Any) -> bool:
    """Whether what a layer of the cache keeps beside keys and values is carried as columns."""
    return isinstance(held, DynamicIndexedLayer) or hasattr(held, _KEYS) or hasattr(held, _COMPRESS)


def counts_columns(held: Any) -> bool:
    """Whether the base takes a layer's columns for positions, so that padding would count."""
    return hasattr(held, _KEYS) or hasattr(held, _COMPRESS) or getattr(held, "is_sliding", False)


def traced_layer(held: Any) -> Any:
    """What stands in the place of a new layer of the cache: one that keeps every column."""
    return CompressedLayer(held.compress_rate) if hasattr(held, _COMPRESS) else keeping_all(held)


def columns_of(held: Any) -> Mapping[str, Tensor]:
    """What a layer of the cache keeps of each token beside keys and values, `[B, 1, P, width]` by part."""
    if isinstance(held, CompressedLayer):
        return held.given
    if hasattr(held, _COMPRESS):
        kinds = {"kv": held.buffer_kv, "gate": held.buffer_gate}
        return {f"{name}_{kind}": kinds[kind][name].unsqueeze(1) for name in held.buffer_kv for kind in kinds}
    keys = getattr(held, _KEYS, None)
    if isinstance(held, DynamicIndexedLayer) and held.indexer_keys is not None:
        keys = held.indexer_keys.unsqueeze(1)
    return {} if keys is None else {contract.INDEXER_KEY: keys}


def fill_columns(held: Any, past: Mapping[str, Tensor]) -> None:
    """Let a layer of the cache begin with what `columns_of` gave of it."""
    if isinstance(held, CompressedLayer):
        held.given = {part: past[part] for part in contract.COLUMNS if part in past}
    elif contract.INDEXER_KEY in past and isinstance(held, DynamicIndexedLayer):
        held.indexer_keys, held.is_indexer_initialized = past[contract.INDEXER_KEY].squeeze(1), True
        # Qwen4's rotates them by it, and rows without padding count columns. Of time, height and width alike.
        held.indexer_position_ids = torch.arange(held.indexer_keys.shape[1]).expand(3, held.indexer_keys.shape[0], -1)
    elif contract.INDEXER_KEY in past:
        setattr(held, _KEYS, past[contract.INDEXER_KEY])

"""Trace Qwen4's block selection and its n-gram embeddings without loops over tokens.

Its indexer averages the keys of each block of a few tokens, and selects blocks for each token separately. The functions
below do this for all tokens at once, for rows without padding.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from deltamem_tool.onnx.export.choices import dynamic_min

_NGRAMS = "Qwen4ExpTextNGramEmbedding"
_PLE_CONVOLUTION = 1  # index of its state


def has_blocks(model: PreTrainedModel) -> bool:
    """Return whether functions below replace methods of `model`. Its rows must then have no padding."""
    return any(type(part).__name__ in _METHODS for part in model.modules())


def end_of_text(model: PreTrainedModel) -> int:
    """Return the token that precedes a text in n-gram embeddings; 0 if the model has none."""
    embeddings: list[Any] = [part for part in model.modules() if type(part).__name__ == _NGRAMS]
    return int(embeddings[0].eos_token_id) if embeddings else 0


@contextmanager
def replace_loops(model: PreTrainedModel) -> Iterator[None]:
    """Replace methods of the modules in `model` by the functions below, inside the block."""
    kinds = {type(part) for part in model.modules() if type(part).__name__ in _METHODS}
    originals = [(kind, name, vars(kind)[name]) for kind in kinds for name in _METHODS[kind.__name__]]
    for kind, name, _ in originals:
        setattr(kind, name, _METHODS[kind.__name__][name])
    try:
        yield
    finally:
        for kind, name, original in originals:
            setattr(kind, name, original)


def _chosen_tokens(
    self: Any, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], attention_mask: Tensor, cache: Any
) -> Tensor:
    """Return the tokens that each token sees, bool `[B, 1, T, N]`: the best whole blocks, and the open one."""
    batch, tokens, _ = hidden_states.shape
    rotate = vars(sys.modules[type(self).__module__])["apply_rotary_pos_emb"]
    q, keys = self.index_qk_proj(hidden_states).split(
        [self.index_n_heads * self.index_head_dim, self.index_head_dim], dim=-1
    )
    cos, sin = position_embeddings
    q = self.q_layernorm(q.reshape(batch, tokens, -1, self.index_head_dim))
    q = rotate(q, cos=cos[:, -tokens:], sin=sin[:, -tokens:], unsqueeze_dim=2)
    keys = cache.update_indexer(keys, self.layer_idx)  # [B, N, width]
    size, columns = self.compress_ratio, keys.shape[1]
    blocks = columns // size + 1  # including the open one
    pooled, cos, sin = (
        F.pad(x, (0, 0, 0, blocks * size - columns)).view(batch, blocks, size, -1) for x in (keys, cos, sin)
    )
    pooled = self.k_layernorm(pooled.float().mean(2).to(keys.dtype))
    pooled = rotate(pooled[:, :, None], cos=cos[:, :, 0], sin=sin[:, :, 0], unsqueeze_dim=2)[:, :, 0]
    scores = torch.relu(q.float() @ pooled.float().transpose(1, 2)[:, None]).sum(2) / math.sqrt(self.index_head_dim)
    seen = attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0
    whole = seen.sum(-1).squeeze(1)[..., None] // size  # [B, T, 1], number of whole blocks that each token sees
    is_whole = torch.arange(blocks) < whole
    best = scores.masked_fill(~is_whole, -torch.inf).topk(dynamic_min(self.block_topk, blocks), dim=-1).indices
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True) & is_whole
    block = torch.arange(columns) // size
    tokens_chosen: Tensor = chosen.index_select(-1, block) | (block >= whole)
    return tokens_chosen[:, None]


def _shift_tokens(self: Any, token_ids: Tensor, shift: int) -> Tensor:
    """Return `token_ids` `[B, N]` shifted by `shift`, with the end-of-text token where a text ended in between."""
    shifted = token_ids
    for distance in range(1, shift + 1):
        before = F.pad(token_ids, (distance, 0), value=self.eos_token_id)[:, : token_ids.shape[1]]
        shifted = before if distance == 1 else torch.where(shifted == self.eos_token_id, shifted, before)
    return shifted


def _short_convolution(self: Any, hidden_states: Tensor, cache: Any) -> Tensor:
    """Convolve `[B, T, C]`, preceded by the kept inputs, which are exactly as many as the kernel needs."""
    convolution: nn.Conv1d = self.conv1d
    joined = cache.update_conv_state(hidden_states.transpose(1, 2), self.layer_idx, state_idx=_PLE_CONVOLUTION)
    return F.silu(convolution(joined.to(convolution.weight.dtype))).transpose(1, 2)


_METHODS: dict[str, dict[str, Callable[..., Tensor]]] = {
    "Qwen4ExpTextQSAIndexer": {"forward": _chosen_tokens},
    _NGRAMS: {"_shift_right_ignore_eos": _shift_tokens},
    "Qwen4ExpTextPLELayer": {"_short_conv": _short_convolution},
}

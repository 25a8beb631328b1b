"""Greedy continuation by transformers' own `generate`, to compare conversations with."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from deltamem_tool import MemoryCache


def continue_greedily(
    model: PreTrainedModel,
    ids: Tensor,
    cache: MemoryCache,
    new_tokens: int,
    pad: int,
    stop_tokens: int | list[int] | None = None,
) -> Tensor:
    """`ids` `[1, T]` with their greedy continuation; `cache` holds the beginning of `ids`."""
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        cache=cache,
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=stop_tokens,
        pad_token_id=pad,
    )

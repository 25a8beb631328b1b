"""Tiny hybrids: models with convolutions or linear attention in some layers, with attention or instead of it."""

from __future__ import annotations

import torch
from base_model.tiny_configs import tiny_config, with_depth
from helpers.tiny import END, PAD, randomise
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from deltamem_tool import DeltaMemConfig, attach

# One of each kind: only convolutions, gated delta rule, Mamba 2, both in one layer, layers with neither.
HYBRIDS = ("lfm2", "qwen3_5_text", "granitemoehybrid", "falcon_h1", "nemotron_h")
# Types that keep other tensors besides keys and values, with the number of layers that this needs: an indexer's keys by
# token and in blocks, compressed keys, convolutions with windows, and n-grams. All but the first run row by row.
OTHER_CACHES = dict(deepseek_v32=1, minimax_m3_vl_text=2, deepseek_v4=3, inkling_text=2, qwen4_exp_text=2)


def hybrid_base(name: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A tiny model of the type, for a tokenizer of `helpers.tiny`."""
    torch.manual_seed(0)
    config = tiny_config(name)
    config = with_depth(config, OTHER_CACHES[name]) if name in OTHER_CACHES else config
    config.vocab_size, config.pad_token_id, config.eos_token_id = len(tokenizer), PAD, END
    config.bos_token_id, config.max_position_embeddings = None, 512
    return AutoModelForCausalLM.from_config(config).eval()


def hybrid(name: str, tokenizer: PreTrainedTokenizerBase, **options) -> PreTrainedModel:
    """A tiny model of the type, with a memory of random weights."""
    model = hybrid_base(name, tokenizer)
    randomise(attach(model, DeltaMemConfig(**{"rank": 4, "state_heads": 2, "branches": ("q", "o"), **options})))
    return model

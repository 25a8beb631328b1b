"""Models inside a wrapper whose signature hides the model's arguments: PEFT and torch.compile."""

from __future__ import annotations

from functools import partial

import peft
import pytest
import torch
from helpers.model_runs import CUT_TOLERANCE, close
from helpers.tiny import PAD, randomise, tokens
from transformers import GPT2Config, GPT2LMHeadModel

from deltamem_tool import DeltaMemConfig, MemoryCache, attach
from deltamem_tool._compat import peft_model
from deltamem_tool.memory.call_options import CallOptions


def gpt2(**changes):
    """A GPT-2, whose learned positions make the output depend on where a row begins."""
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 96, "n_positions": 128, "initializer_range": 0.2}
    config = GPT2Config(**sizes | changes, bos_token_id=None, eos_token_id=1)
    return GPT2LMHeadModel(config).eval()


def with_lora(model):
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
    return peft_model(model, config).eval()


def compiled(model):
    return torch.compile(model, backend="eager")


def test_the_options_of_a_compiled_model_compile_nothing():
    """They call the model to see where it begins to count."""
    graphs = []
    base = gpt2()
    attach(base, DeltaMemConfig(rank=4))
    options = CallOptions(torch.compile(base, backend=lambda graph, inputs: graphs.append(graph) or graph), "last")
    assert options.counts_positions and graphs == []


SLOW = partial(pytest.param, marks=pytest.mark.slow)  # it compiles


@pytest.mark.parametrize("wrap", [with_lora, SLOW(compiled), SLOW(lambda model: compiled(with_lora(model)))])
@pytest.mark.parametrize("logits", ["last", "all"])
@torch.no_grad()
def test_a_padded_row_matches_the_row_alone(wrap, logits):
    base = gpt2()
    model = wrap(base)
    randomise(attach(base, DeltaMemConfig(rank=4)))
    rows = [tokens(1, 9), tokens(1, 5, seed=1)]
    ids, mask = torch.full((2, 9), PAD), torch.zeros(2, 9, dtype=torch.long)
    for row, text in enumerate(rows):
        ids[row, -text.shape[1] :], mask[row, -text.shape[1] :] = text, 1
    together = CallOptions(model, logits).logits(model, ids, mask, MemoryCache(base))
    for row, text in enumerate(rows):
        alone = base(text).logits[0]
        count = 1 if logits == "last" else len(alone)
        close(together[row, -count:], alone[-count:], CUT_TOLERANCE)

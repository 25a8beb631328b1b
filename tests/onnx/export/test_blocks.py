"""The replacements of Qwen4's own methods choose and embed the same blocks."""

from __future__ import annotations

import pytest
import torch
from helpers.hybrids import hybrid
from helpers.tiny import tiny_tokenizer

from deltamem_tool import MemoryCache
from deltamem_tool.onnx.export.base_states import _windows
from deltamem_tool.onnx.export.blocks import end_of_text, has_blocks, replace_loops
from deltamem_tool.onnx.export.choices import StableTopK


@pytest.fixture(scope="module")
def model():
    return hybrid("qwen4_exp_text", tiny_tokenizer())


def test_every_token_chooses_the_same_blocks(model):
    indexer, tokens, calls = model.model.layers[1].self_attn.indexer, 23, (14, 1, 8)
    hidden = torch.randn(2, tokens, model.config.hidden_size, dtype=torch.float32)
    positions = torch.arange(tokens).expand(3, 2, -1)
    causal = torch.ones(2, 1, tokens, tokens, dtype=torch.bool).tril()

    def chosen() -> list[torch.Tensor]:
        cache, blocks, start = MemoryCache(model), [], 0
        for count in calls:
            stop = start + count
            rotary = model.model.rotary_emb(hidden, positions[..., :stop])
            mask = causal[:, :, start:stop, :stop]
            blocks.append(indexer(hidden[:, start:stop], rotary, mask, cache) & mask)
            start = stop
        return blocks

    with torch.no_grad(), StableTopK():
        expected = chosen()
        with replace_loops(model):
            blocks = chosen()
    assert not all(mask.all() for mask in expected) and all(map(torch.equal, blocks, expected))
    assert has_blocks(model)


def test_n_grams_do_not_cross_the_end_of_a_text(model):
    embedding = model.model.layers[0].ple.ple_embedding
    end = end_of_text(model)
    tokens = torch.tensor([[5, 6, end, 7, 8, 9], [end, end, 5, 6, 7, end]])
    for shift in range(4):
        expected = embedding._shift_right_ignore_eos(tokens, shift)
        with replace_loops(model):
            assert torch.equal(embedding._shift_right_ignore_eos(tokens, shift), expected)


@pytest.mark.parametrize(("dimension", "size", "step"), [(-1, 4, 1), (1, 2, 1), (2, 3, 2)])
def test_windows_are_stacked_slices(dimension, size, step):
    x = torch.rand(2, 5, 9)
    assert torch.equal(_windows(x, dimension, size, step), x.unfold(dimension, size, step))

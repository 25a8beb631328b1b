"""Writing by message, in a few very different layouts: splitting a text changes nothing."""

from __future__ import annotations

import pytest
import torch
from helpers.model_runs import relatively_close
from helpers.tiny import randomise
from torch import Tensor
from transformers import AutoModelForCausalLM

import deltamem_tool as deltamem
from base_model.tiny_configs import TEXT_IDS, tiny_config
from deltamem_tool import DeltaMemConfig, MemoryCache

CUT_TOLERANCE = 1e-4  # float32 against float32, the same sums in another order
# 0 only reads, 1 is inside a message, 2 is its last token. The last message of the first row stays open.
TAGS = torch.tensor([[0, 1, 1, 2, 1, 2, 2, 0, 1, 1], [1, 1, 1, 1, 2, 0, 1, 0, 2, 0]], dtype=torch.int8)
LENGTH = TAGS.shape[1]
OPEN = [2, 0]


@pytest.mark.parametrize(
    "model_type", ["gpt2", "falcon", "gpt_neox", "opt", "bert", "deepseek_v3", "qwen3_next", "gemma4_text"]
)
@torch.no_grad()
def test_splitting_messages_over_calls_changes_nothing(model_type: str):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type), attn_implementation="eager").eval()
    randomise(deltamem.attach(model, DeltaMemConfig(rank=4, granularity="message")))
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(TEXT_IDS.start, TEXT_IDS.stop, (2, LENGTH), generator=generator)

    def run(pieces: list[int], tags: Tensor) -> tuple[Tensor, MemoryCache]:
        cache = MemoryCache(model)
        cache.segment_tags = tags
        logits = [model(piece, cache=cache).logits for piece in ids.split(pieces, dim=1)]
        return torch.cat(logits, dim=1), cache

    whole, cache = run([LENGTH], TAGS)
    assert cache.memory.open_tokens.tolist() == OPEN
    for pieces in ([1] * LENGTH, [5, LENGTH - 5]):
        logits, other = run(pieces, TAGS)
        relatively_close(logits, whole, CUT_TOLERANCE)
        for layer, state in cache.memory.layers.items():
            relatively_close(other.memory.layers[layer], state, CUT_TOLERANCE)
            relatively_close(other.memory.open_segments[layer], cache.memory.open_segments[layer], CUT_TOLERANCE)
    unmarked, _ = run([LENGTH], torch.where(TAGS == 2, 1, TAGS))
    assert not torch.allclose(unmarked, whole, atol=CUT_TOLERANCE), "where messages end does not matter"

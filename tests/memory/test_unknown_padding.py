"""Padding with a token that the tokenizer has and the model's embedding lacks."""

from __future__ import annotations

import pytest
import torch
from helpers.model_runs import close, close_memory
from helpers.tiny import patched_model, tokens
from memory.test_generate import continue_alone, settings

from deltamem_tool import MemoryCache

TOLERANCE = 2e-5
UNKNOWN = 10_000


@pytest.mark.parametrize("granularity", ["token", "message"])
@torch.no_grad()
def test_padding_without_an_embedding_is_ignored(granularity):
    model = patched_model(granularity=granularity)
    ids, mask = tokens(2, 8), torch.ones(2, 8, dtype=torch.long)
    ids[1, :3], mask[1, :3] = UNKNOWN, 0
    cache, alone = MemoryCache(model), MemoryCache(model)
    logits = model(ids, attention_mask=mask, cache=cache).logits
    close(logits[1, 3:], model(ids[1:, 3:], cache=alone).logits[0], TOLERANCE)
    close_memory(cache.memory.select([1]), alone.memory)
    with pytest.raises(IndexError):  # as text, it is unknown
        model(ids, cache=MemoryCache(model))


def test_finished_rows_are_padded_with_the_unknown_token():
    model = patched_model()
    rows = [tokens(1, 5), tokens(1, 5, seed=1)]
    answers = [continue_alone(model, row)[0] for row in rows]
    end = next(token for token in answers[0][1:4] if token not in answers[1])
    cache = MemoryCache(model)
    model.generate(torch.cat(rows), cache=cache, **settings(eos_token_id=end, pad_token_id=UNKNOWN))
    for number, row in enumerate(rows):
        close_memory(cache.memory.select([number]), continue_alone(model, row, stop=end)[1].memory)

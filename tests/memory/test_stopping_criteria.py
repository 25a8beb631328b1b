"""Rows that a stopping criterion of `generate` ends have the same memory as alone."""

from __future__ import annotations

import pytest
import torch
from helpers.model_runs import close_memory
from helpers.tiny import tiny_tokenizer, tokens
from transformers import StoppingCriteria
from transformers import StoppingCriteriaList as Criteria

from deltamem_tool import DeltaMemConfig, MemoryCache, attach

NEW = 8
NEVER, SILENT = 1, [0, 1]


class Says(StoppingCriteria):
    """Ends a row after one of the given tokens."""

    def __init__(self, *ends: int) -> None:
        self._ends = torch.tensor(ends)

    def __call__(self, input_ids, scores, **kwargs):
        return torch.isin(input_ids[:, -1], self._ends)


@pytest.fixture(scope="module")
def model():
    from helpers.tiny import randomise, tiny_model

    model = tiny_model(vocab_size=len(tiny_tokenizer()))
    randomise(attach(model, DeltaMemConfig(rank=4)))
    return model


def say(model, ids, mask=None, **options):
    cache = MemoryCache(model)
    settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": NEVER, "suppress_tokens": SILENT}
    mask = torch.ones_like(ids) if mask is None else mask
    generated = model.generate(ids, attention_mask=mask, cache=cache, pad_token_id=0, **settings | options)
    return generated[:, ids.shape[1] :], cache.memory


@pytest.mark.parametrize("how", ["stop string", "criterion", "criterion without a stop token", "either", "sampled"])
def test_a_row_that_has_ended_writes_nothing(model, how):
    tokenizer, rows = tiny_tokenizer(), [tokens(1, 5), tokens(1, 7, seed=1)]
    ids = torch.cat([torch.nn.functional.pad(rows[0], (2, 0)), rows[1]])
    mask = torch.tensor([[0, 0, *[1] * 5], [1] * 7])
    answers = [say(model, row)[0][0].tolist() for row in rows]
    end = next(token for token in answers[0][1:4] if token not in answers[1])
    options = {
        "stop string": {"stop_strings": [tokenizer.decode([end])], "tokenizer": tokenizer},
        "criterion": {"stopping_criteria": Criteria([Says(end)])},
        "criterion without a stop token": {"stopping_criteria": Criteria([Says(end)]), "eos_token_id": None},
        "either": {"stopping_criteria": Criteria([Says(answers[1][5])]), "eos_token_id": end},
        "sampled": {"stopping_criteria": Criteria([Says(end)]), "do_sample": True, "top_k": 1},
    }[how]
    together, memory = say(model, ids, mask, **options)
    for number, row in enumerate(rows):
        alone, expected = say(model, row, **options)
        assert together[number, : alone.shape[1]].tolist() == alone[0].tolist()
        close_memory(memory.select([number]), expected)
    assert say(model, rows[0], **options)[0].shape[1] < together.shape[1], "no row is fed after its end"


def test_the_next_generation_on_the_same_cache_starts_all_rows(model):
    ids, cache = tokens(2, 6), MemoryCache(model)
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": NEVER, "pad_token_id": 0}
    first = model.generate(
        ids, cache=cache, stopping_criteria=Criteria([Says(*range(model.config.vocab_size))]), **options
    )
    text = torch.cat([first, tokens(2, 3, seed=1)], dim=1)
    model.generate(text, cache=cache, **options)
    expected = MemoryCache(model)
    model.generate(text, cache=expected, **options)
    close_memory(cache.memory, expected.memory)

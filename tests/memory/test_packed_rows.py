"""Rows packed with several texts raise: a row has one memory."""

from __future__ import annotations

import pytest
import torch
from helpers.model_runs import close
from helpers.tiny import patched_model, tokens
from transformers import DataCollatorWithFlattening

from deltamem_tool import MemoryCache
from deltamem_tool.errors import MemoryStateError

TOLERANCE = 2e-5
TEXTS = [{"input_ids": list(range(6, 6 + length))} for length in (4, 7)]
RESTARTING = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])


@pytest.fixture(scope="module")
def model():
    return patched_model()


def flattened(texts, **options):
    batch = DataCollatorWithFlattening(return_tensors="pt", **options)(texts)
    return {name: value for name, value in batch.items() if name != "labels"}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"return_flash_attn_kwargs": True, "return_position_ids": False},
        {"return_seq_idx": True, "return_position_ids": False},
    ],
    ids=str,
)
def test_packed_sequences_of_transformers_raise(model, options):
    with pytest.raises(MemoryStateError, match="packed with several texts"):
        model(**flattened(TEXTS, **options), use_cache=False)
    one = flattened(TEXTS[1:], **options)
    with torch.no_grad():
        close(model(**one, use_cache=False).logits, model(one["input_ids"]).logits, TOLERANCE)


@pytest.mark.parametrize(
    "inputs",
    [
        {"use_cache": False},
        {"use_cache": True},
        {"attention_mask": torch.ones(2, 8, dtype=torch.long)},
    ],
    ids=["no cache", "a cache of its own", "a mask"],
)
def test_positions_that_restart_within_a_row_raise(model, inputs):
    with pytest.raises(MemoryStateError, match="packed with several texts"):
        model(tokens(2, 8), position_ids=RESTARTING, **inputs)


def test_a_rejected_call_leaves_the_cache_unchanged(model):
    cache = MemoryCache(model)
    with torch.no_grad():
        model(tokens(1, 5), cache=cache)
        before = cache.memory
        with pytest.raises(MemoryStateError, match="packed"):
            model(tokens(1, 8), position_ids=RESTARTING, cache=cache)
    assert cache.memory is before and cache.get_seq_length() == 5


@torch.no_grad()
def test_packed_rows_may_read_a_memory_that_is_not_written(model):
    start, texts = MemoryCache(model), tokens(1, 8)
    model(tokens(1, 9, seed=1), cache=start)
    read = [MemoryCache(model, memory=start.memory, write=False) for _ in range(3)]
    packed = model(texts, position_ids=RESTARTING, cache=read[0], use_cache=False).logits
    apart = [model(ids, cache=cache).logits for ids, cache in zip((texts[:, :4], texts[:, 4:]), read[1:], strict=True)]
    assert packed.shape == torch.cat(apart, dim=1).shape
    close(packed[:, :4], apart[0], TOLERANCE)


@torch.no_grad()
def test_positions_of_padding_are_ignored(model):
    """`generate` and data collators give padding arbitrary positions."""
    ids, mask = tokens(2, 8), torch.ones(2, 8, dtype=torch.long)
    for padding in (slice(0, 3), slice(6, 8)):
        padded = mask.clone()
        padded[1, padding] = 0
        positions = (padded.cumsum(1) - 1).masked_fill(padded == 0, 1)
        logits = model(ids, attention_mask=padded, position_ids=positions).logits
        text = padded[1].bool()
        close(logits[1, text], model(ids[1:, text]).logits[0], TOLERANCE)


@torch.no_grad()
def test_positions_may_start_anywhere_and_have_gaps(model):
    model(tokens(1, 8), position_ids=torch.arange(5, 13)[None], use_cache=False)
    gap = torch.tensor([[0, 1, 2, 3, 10, 11, 12, 13]])
    model(tokens(1, 8), position_ids=gap)
    with pytest.raises(MemoryStateError, match="packed"):  # here, transformers treats it as another text
        model(tokens(1, 8), position_ids=gap, use_cache=False)

"""Invalid tags and segments raise, and change neither the memory nor the tags of a cache."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny import patched_model, tokens
from segments.tagged import LENGTH, TAGS, run, same_memory
from torch import nn

from deltamem_tool import MemoryCache, MemoryState
from deltamem_tool.errors import MemoryStateError
from deltamem_tool.segments.tags import SegmentTag


class _Broken(nn.Module):
    def forward(self, *args, **kwargs):
        raise RuntimeError("broken on purpose")


def test_an_exception_in_the_decoder_leaves_memory_and_tags_unchanged(model):
    ids = tokens(2, LENGTH)
    _, cache = run(model, ids[:, :5], TAGS[:, :5])
    before, copy, tags = cache.memory, cache.memory.clone(), TAGS[:, 5:].clone()
    cache.segment_tags = tags
    whole = model.model.layers[1].mlp
    model.model.layers[1].mlp = _Broken()
    try:
        with pytest.raises(RuntimeError, match="on purpose"):
            model(ids[:, 5:], cache=cache)
    finally:
        model.model.layers[1].mlp = whole
    assert cache.memory is before and cache.segment_tags is tags and torch.equal(tags, TAGS[:, 5:])
    same_memory(before, copy)


def test_calling_without_a_cache_raises_since_there_are_no_tags(model):
    with pytest.raises(MemoryStateError, match=r"(?s)writes by message.*MemoryCache"):
        model(tokens(1, 3))
    with pytest.raises(MemoryStateError, match="writes by message"):
        model(tokens(1, 3), use_cache=False)


@pytest.mark.parametrize(
    ("tags", "says"),
    [
        ([[1, 1], [1, 1]], r"cache.segment_tags has shape \[2, 2\], but the tokens have \[2, 3\]"),
        ([[1, 1, 2]], r"cache.segment_tags has shape \[1, 3\], but the tokens have \[2, 3\]"),
        ([[1, 1, 2]] * 3, r"cache.segment_tags has shape \[3, 3\], but the tokens have \[2, 3\]"),
        ([1, 1, 2], r"cache.segment_tags has shape \[3\], but"),
        ([[1, 1, 3], [1, 1, 2]], "values that are not segment tags"),
        ([[1, 1, 2], [-1, 1, 2]], "values that are not segment tags"),
        ([[1, 1, 2], [1, 1, 2]], "puts padding into a segment"),
    ],
)
def test_invalid_tags_raise(model, tags, says):
    _, cache = run(model, tokens(2, 5, seed=1), TAGS[:, :5])
    before, copy = cache.memory, cache.memory.clone()
    cache.segment_tags = tag_tensor = torch.tensor(tags)
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[1, 5] = 0  # of the new tokens
    for write in (True, False):
        cache.write = write
        with pytest.raises(MemoryStateError, match=says):
            model(tokens(2, 3), cache=cache, attention_mask=mask)
        assert cache.memory is before and cache.segment_tags is tag_tensor and tag_tensor.tolist() == tags
        same_memory(before, copy)


def test_tags_that_are_not_a_tensor_raise(model):
    cache = MemoryCache(model)
    cache.segment_tags = [[1, 1, 2]]
    with pytest.raises(MemoryStateError, match=r"cache.segment_tags is a list"):
        model(tokens(1, 3), cache=cache)
    assert cache.memory is None


def test_tags_raise_for_an_adapter_that_writes_by_token():
    model = patched_model()
    cache = MemoryCache(model)
    with torch.no_grad():
        model(tokens(1, 3), cache=cache)
    before = cache.memory
    cache.segment_tags = tags = torch.full((1, 3), SegmentTag.INSIDE)
    with pytest.raises(MemoryStateError, match=r"(?s)has no segments.*Do not set cache.segment_tags"):
        model(tokens(1, 3), cache=cache)
    with pytest.raises(MemoryStateError, match=r"(?s)has no segments.*Do not call end_segment\(\)"):
        cache.end_segment()
    assert cache.memory is before and cache.segment_tags is tags


def test_ending_an_empty_segment_raises(model):
    cache = MemoryCache(model)
    with pytest.raises(MemoryStateError, match="open segment is empty"):
        cache.end_segment()
    assert cache.memory is None
    _, cache = run(model, tokens(1, 4), torch.tensor([[1, 1, 2, 0]]))
    before, copy = cache.memory, cache.memory.clone()
    cache.segment_tags = tags = torch.tensor([[1, 2]])
    with pytest.raises(MemoryStateError, match="open segment is empty"):
        cache.end_segment()
    assert cache.memory is before and cache.segment_tags is tags
    same_memory(before, copy)


def test_a_memory_without_open_segments_raises(model):
    _, cache = run(model, tokens(1, 4), TAGS[:1, :4])
    bare = MemoryState(cache.memory.layers, cache.memory.adapter)
    with pytest.raises(MemoryStateError, match="keeps 0 numbers of an open segment, the adapter 13"):
        MemoryCache(model, memory=bare)
    cache.memory = bare
    with pytest.raises(MemoryStateError, match="keeps 0 numbers"):
        model(tokens(1, 1), cache=cache)

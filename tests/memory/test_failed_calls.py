"""A failed call leaves the cache's keys, values and memory unchanged."""

from __future__ import annotations

import pytest
import torch
from helpers.model_runs import close, close_memory
from helpers.tiny import patched_model, tokens

from deltamem_tool import MemoryCache

TOLERANCE = 2e-5
ROOM = 24


class Broken(Exception):
    pass


def fail(*_):
    raise Broken


@torch.no_grad()
@pytest.mark.parametrize("room", [None, ROOM])
@pytest.mark.parametrize("before", [0, 5])
@pytest.mark.parametrize("place", ["the second layer", "after the layers", "the embedding"])
def test_a_failed_call_leaves_the_cache_unchanged(room, before, place):
    """Covers running out of memory, a tensor of the wrong shape, and a token without an embedding."""
    model, ids = patched_model(), tokens(2, 12)
    cache, expected = MemoryCache(model, max_length=room), MemoryCache(model, max_length=room)
    if before:
        for each in (cache, expected):
            model(ids[:, :before], cache=each)
    memory = cache.memory
    if place == "the embedding":
        with pytest.raises(IndexError):
            model(torch.full((2, 3), 10_000), cache=cache)
    else:
        module = model.model.layers[1].mlp if place == "the second layer" else model.model.norm
        handle = module.register_forward_pre_hook(fail)
        with pytest.raises(Broken):
            model(ids[:, before : before + 3], cache=cache)
        handle.remove()
    assert cache.memory is memory and int(cache.get_seq_length()) == before
    close(model(ids[:, before:], cache=cache).logits, model(ids[:, before:], cache=expected).logits, TOLERANCE)
    close_memory(cache.memory, expected.memory)

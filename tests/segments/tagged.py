"""Tagged tokens of two conversations, a function that feeds them to a model, and comparisons of memories."""

from __future__ import annotations

import itertools

import torch
from helpers.model_runs import CUT_TOLERANCE, close

from deltamem_tool import MemoryCache, MemoryState

DIFFERENT = 1e-3  # more than rounding explains

# Two conversations. The first has a system message, segments of three, two and one tokens, and an open one.
TAGS = torch.tensor([[0, 0, 1, 1, 2, 1, 2, 2, 0, 1, 1], [1, 1, 1, 1, 1, 2, 0, 1, 0, 2, 0]], dtype=torch.int8)
LENGTH = TAGS.shape[1]
OPEN = [2, 0]  # tokens that wait for their segment to end


def close_memory(memory: MemoryState, other: MemoryState, tolerance=CUT_TOLERANCE):
    """Compare states and open segments."""
    assert memory.open_segments.keys() == other.open_segments.keys() == memory.layers.keys() == other.layers.keys()
    for layer in other.layers:
        close(memory.layers[layer], other.layers[layer], tolerance)
        close(memory.open_segments[layer], other.open_segments[layer], tolerance)
    assert torch.equal(memory.open_tokens, other.open_tokens)


def same_memory(memory: MemoryState, other: MemoryState):
    close_memory(memory, other, 0.0)


@torch.no_grad()
def run(model, ids, tags, cuts=(), memory=None, write=True, sliced=False):
    """Logits of `ids` fed in pieces that end at `cuts`, the tags given at once or with each piece; and the cache."""
    cache = MemoryCache(model, memory=memory, write=write)
    cache.segment_tags = None if sliced else tags
    bounds, pieces = [0, *cuts, ids.shape[1]], []
    for a, b in itertools.pairwise(bounds):
        if sliced:
            cache.segment_tags = tags[:, a:b]
        pieces.append(model(ids[:, a:b], cache=cache).logits)
    assert cache.segment_tags is None, "tags of tokens that have come are used up"
    return torch.cat(pieces, dim=1), cache

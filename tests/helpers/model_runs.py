"""Run tiny patched models over a text in pieces, and compare results within named tolerances."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers.tiny import ARCHITECTURES

from deltamem_tool import MemoryCache, MemoryState

HEADS = (("q", "o"), ("k", "v"), ("q", "k", "v", "o"), ("o",))
RULES = ("standard", "lambda_outside", "no_lambda")
# Float32 against the float64 equations; logits and states are of order 1 to 10.
EQUATION_TOLERANCE = 5e-5
# Float32 against float32, the same sums in another order.
CUT_TOLERANCE = 2e-5

every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


def close(actual, expected, tolerance=CUT_TOLERANCE):
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0, check_dtype=False)


def relatively_close(actual, expected, tolerance):
    """To within `tolerance` of the largest number, where that is more than one."""
    largest = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(actual / largest, expected / largest, atol=tolerance, rtol=0)


def close_memory(memory: MemoryState, other: MemoryState, tolerance=CUT_TOLERANCE):
    assert sorted(memory.layers) == sorted(other.layers)
    for layer, state in other.layers.items():
        close(memory.layers[layer], state, tolerance)


def cache_of(output):
    """The cache in a model's output, which transformers 5.24 has renamed."""
    return output.get("cache") or output.get("past_key_values")


@torch.no_grad()
def run(model, ids, cuts=(), memory=None, write=True):
    """Logits of `ids` fed in pieces that end at `cuts`, and the cache."""
    cache = MemoryCache(model, memory=memory, write=write)
    bounds = [0, *cuts, ids.shape[1]]
    pieces = [model(ids[:, a:b], cache=cache).logits for a, b in itertools.pairwise(bounds)]
    return torch.cat(pieces, dim=1), cache


def fingerprint_of_base(model):
    hooks = {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()}
    return [name for name, _ in model.named_modules()], hooks, {n: p.requires_grad for n, p in model.named_parameters()}

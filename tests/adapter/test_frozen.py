"""Folders and files written by earlier versions can still be read; no test rewrites them.

`fixtures/adapter-format-1` was made once, by version 0.1.0: a Qwen3 of two layers with random weights
(`Qwen3Config(vocab_size=32, hidden_size=16, num_attention_heads=2, …)`, seed 0), an adapter on it (rank 3, 2 state
heads, by message, every branch, an own λ, scales by branch, o_norm; `tiny.randomise` with seed 3), the memory after
`ids` in `segments`, and in `expected.json` what that version computed of all this.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from deltamem_tool import MemoryCache, MemoryState, load
from deltamem_tool.memory.attach import adapter_of

FIXTURE = Path(__file__).parents[1] / "fixtures" / "adapter-format-1"
TOLERANCE = 1e-5  # for logits and states of up to 4: other processors and versions of torch add in another order


@pytest.fixture
def expected():
    return json.loads((FIXTURE / "expected.json").read_text())


@pytest.fixture
def unchanged_fixture():
    """Checks that nothing writes into the fixture."""

    def content():
        return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in FIXTURE.rglob("*") if path.is_file()}

    before = content()
    yield
    assert content() == before


def assert_close(actual, expected):
    torch.testing.assert_close(actual, torch.tensor(expected).view(actual.shape), rtol=0, atol=TOLERANCE)


def test_an_adapter_of_format_1_gives_the_same_results(unchanged_fixture, expected):
    model = load(FIXTURE / "adapter", base=str(FIXTURE / "base"))
    assert adapter_of(model).fingerprint == expected["fingerprint"]
    cache = MemoryCache(model)
    cache.segment_tags = torch.tensor(expected["segments"], dtype=torch.int8)
    with torch.no_grad():
        logits = model(torch.tensor(expected["ids"]), cache=cache).logits
    assert_close(logits[:, -1], expected["last_logits"])
    for layer, state in cache.memory.layers.items():
        assert_close(state, expected["states"][str(layer)])
        assert_close(cache.memory.open_segments[layer], expected["open_segments"][str(layer)])


def test_a_memory_of_format_1_can_be_continued(unchanged_fixture, expected):
    model = load(FIXTURE / "adapter", base=str(FIXTURE / "base"))
    memory = MemoryState.load(FIXTURE / "memory.safetensors")
    assert list(memory.layers) == [0, 1]
    for layer, state in memory.layers.items():
        assert_close(state, expected["states"][str(layer)])
    with torch.no_grad():
        cache = MemoryCache(model, memory=memory, write=False)
        logits = model(torch.tensor(expected["next_ids"]), cache=cache).logits
    assert_close(logits[:, -1], expected["next_logits_from_memory"])

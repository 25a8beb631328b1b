"""Ending an open segment in numpy gives the same state as in PyTorch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from deltamem_tool.config import UPDATE_RULES, DeltaMemConfig
from deltamem_tool.memory.file import StoredMemory
from deltamem_tool.memory.layer import end_segment

TOLERANCE = 1e-6
OPTIONS = [
    {"update_rule": rule, "gates": gates, "couple_lambda": coupled}
    for rule in UPDATE_RULES
    for gates in ("row", "head")
    for coupled in (True, False)
    if coupled or rule != "no_lambda"
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_numpy_write_matches_pytorch(options):
    config = DeltaMemConfig(rank=4, state_heads=2, granularity="message", **options)
    random = np.random.default_rng(0)
    states = {i: random.normal(size=(3, 2, 4, 4)).astype(np.float32) for i in (0, 5)}
    segments = {i: random.normal(0, 20, (3, config.segment_width)).astype(np.float32) for i in (0, 5)}
    for segment in segments.values():
        segment[:, -1] = 7, 0, 1
        segment[1] = 0  # nothing is open in the second conversation
    ended = StoredMemory(states, segments, "adapter").end_segment(config)
    for layer, state in states.items():
        expected, empty = end_segment(config, torch.from_numpy(state), torch.from_numpy(segments[layer]))
        np.testing.assert_allclose(ended.states[layer], expected, rtol=0, atol=TOLERANCE)
        assert ended.states[layer].dtype == np.float32 and np.abs(ended.states[layer] - state)[[0, 2]].max() > 0.1
        assert np.array_equal(ended.states[layer][1], state[1])
        assert np.array_equal(ended.open_segments[layer], empty)


def test_without_segments_ending_one_changes_nothing():
    memory = StoredMemory({0: np.ones((1, 1, 4, 4), np.float32)}, {}, "adapter")
    ended = memory.end_segment(DeltaMemConfig(rank=4))
    assert np.array_equal(ended.states[0], memory.states[0]) and ended.open_segments == {}

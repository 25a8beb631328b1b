"""Rows that stay in a group when others leave equal the rows selected one by one, and are copied at once."""

from __future__ import annotations

import numpy as np
import pytest
from chat.talking import TOLERANCE, assert_same_memory, make_engine

from deltamem_tool.chat.engine import empty_memory
from deltamem_tool.chat.generation import Token, feed
from deltamem_tool.chat.group import PaddedGroup, PastRow

LENGTHS = 5, 2, 7, 4  # tokens of the rows before the first step


@pytest.fixture(scope="module")
def engine():
    return make_engine()


def part_of(engine, length, seed):
    ids = np.random.default_rng(seed).integers(1, 30, length)
    past = feed(
        engine, engine.start(empty_memory(engine)), np.zeros((1, 0), np.int64), [[Token(int(i), True) for i in ids]]
    )[1]
    return PastRow(past, 1, length, 0, length)


@pytest.mark.parametrize("leaving", [{2}, {0, 3}, {0, 1, 2}])
def test_remaining_rows_are_unchanged_when_others_leave(engine, leaving, monkeypatch):
    parts = [part_of(engine, length, seed) for seed, length in enumerate(LENGTHS)]
    staying = [row for row in range(len(parts)) if row not in leaving]
    first, second = Token(7, True), Token(9, True)
    all_rows, few = PaddedGroup(engine), PaddedGroup(engine)
    all_rows.exchange((), parts)
    few.exchange((), [parts[row] for row in staying])
    all_rows.step([first] * len(parts))
    few.step([first] * len(staying))

    def one_by_one(*args):
        raise AssertionError("each row would be a copy of its own in every layer")

    monkeypatch.setattr(engine, "take", one_by_one)
    assert all_rows.exchange(leaving, ()) == staying
    logits, expected = all_rows.step([second] * len(staying)), few.step([second] * len(staying))
    np.testing.assert_allclose(logits, expected, rtol=0, atol=TOLERANCE)
    for place in range(len(staying)):
        assert_same_memory(all_rows.memory(place), few.memory(place), TOLERANCE)

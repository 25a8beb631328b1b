"""The probe of `benchmarks/untold.py`: the area under the ROC curve, and scores of conversations it has not seen."""

from __future__ import annotations

import numpy as np
from untold import area, conversation, held_out_scores

LEAST = 0.95  # area for readings that show clearly what was told
CHANCE = 0.1  # most that the area of readings without any sign differs from one half


def test_the_area_is_the_share_of_pairs_in_order():
    labels = np.array([True, True, False, False])
    assert area(labels, np.array([3.0, 2.0, 1.0, 0.0])) == 1.0
    assert area(labels, np.array([0.0, 1.0, 2.0, 3.0])) == 0.0
    assert area(labels, np.array([1.0, 3.0, 2.0, 0.0])) == 0.75
    assert area(labels, np.ones(4)) == 0.5


def test_scores_come_from_other_conversations():
    rng = np.random.default_rng(0)
    conversations = np.repeat(np.arange(100), 6)
    labels = np.tile([True, False], 300)
    noise = rng.normal(size=(600, 64)).astype(np.float32)
    signal = noise + np.where(labels, 0.5, -0.5)[:, None].astype(np.float32)
    assert area(labels, held_out_scores(signal, labels, conversations)) > LEAST
    assert abs(area(labels, held_out_scores(noise, labels, conversations)) - 0.5) < CHANCE


def test_as_many_facts_are_asked_for_that_were_told_as_that_were_not():
    for seed in range(20):
        episode, asked = conversation(str(seed))
        told = [fact for fact, is_told in asked if is_told]
        assert 2 * len(told) == len(asked) == len(episode.exchanges)
        history = " ".join(message["content"] for message in episode.history)
        assert all((fact.value in history) == is_told for fact, is_told in asked)

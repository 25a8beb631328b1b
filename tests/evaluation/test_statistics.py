"""Confidence intervals and tests, against theory and enumeration."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from deltamem_tool.errors import ConfigError
from deltamem_tool.evaluation.scoring.statistics import (
    BEYOND,
    FEWEST,
    UNDECIDED,
    WITHIN,
    Difference,
    check_margin,
    difference,
    estimate,
    is_clear,
    position_to_margin,
    verdict,
)

ALONE = [str(number) for number in range(400)]


def test_the_interval_of_a_mean():
    assert estimate([1.0] * 50, ALONE[:50]) == estimate([1.0] * 50, ALONE[:50], seed=9)
    half = estimate([float(number % 2) for number in range(400)], ALONE)
    assert half.mean == 0.5
    normal = 1.96 * 0.5 / np.sqrt(400)
    assert half.low == pytest.approx(0.5 - normal, abs=0.005) and half.high == pytest.approx(0.5 + normal, abs=0.005)


def test_repeated_questions_of_a_history_do_not_narrow_the_interval():
    """Ten copies of every question leave the interval as wide as without them."""
    scores = [float(number % 2) for number in range(40)]
    once = estimate(scores, ALONE[:40])
    copied = estimate(scores * 10, ALONE[:40] * 10)
    assert copied.mean == once.mean and copied.low == once.low and copied.high == once.high
    as_if_alone = estimate(scores * 10, ALONE)
    assert as_if_alone.high - as_if_alone.low < 0.4 * (once.high - once.low)


def test_the_mean_is_over_questions_when_histories_differ_in_size():
    interval = estimate([1.0, 0.0, 0.0, 0.0], ["a", "b", "b", "b"])
    assert interval.mean == 0.25 and interval.low == 0.0 and interval.high == 1.0


def test_the_paired_test_matches_enumeration():
    """The reference counts all signs of six histories one by one."""
    ours, theirs = [0.9, 0.8, 0.7, 0.9, 0.3, 0.6], [0.2, 0.5, 0.6, 0.4, 0.4, 0.1]
    apart = np.subtract(ours, theirs)
    signs = np.array(list(itertools.product([-1, 1], repeat=6)))
    exactly = np.mean(np.abs(signs @ apart) >= abs(apart.sum()) - 1e-9)
    result = difference(ours, theirs, ALONE[:6])
    assert result.p_value == pytest.approx(exactly, abs=0.01) and result.mean == pytest.approx(apart.mean())
    assert result.low < result.mean < result.high


def test_paired_differences_have_narrower_intervals():
    rng = np.random.default_rng(0)
    hard = rng.random(200)
    ours, theirs = np.clip(hard + 0.05 + rng.normal(0, 0.01, 200), 0, 1.1), hard
    paired = difference(list(ours), list(theirs), ALONE[:200])
    assert paired.is_clear and paired.low > 0.04
    assert not difference(list(ours), list(rng.permutation(theirs)), ALONE[:200]).is_clear


def test_the_verdict_in_words():
    assert (
        verdict("donor state", Difference(0.21, 0.17, 0.25, 0.001, 40)) == "the state adds 0.21 ± 0.04 over donor state"
    )
    cut = Difference(1.0, 0.5, 1.0, 0.03, 6)  # at the end of the scale
    assert verdict("donor state", cut) == "the state adds 1.00 ± 0.50 over donor state"
    assert verdict("full context", Difference(-0.1, -0.2, 0.0, 0.01, 40)).startswith("the state costs 0.10 ± 0.10")
    unclear = verdict("full context", Difference(0.01, -0.03, 0.05, 0.4, 40))
    assert unclear == "over full context, the difference is not distinguishable from 0 (+0.01 ± 0.04)"
    few = difference([1.0] * 5, [0.0] * 5, ALONE[:5])
    assert few.p_value > 0.05 and verdict("zeros", few) == "over zeros, 5 histories are too few for a test (+1.00)"


def test_an_interval_is_compared_with_a_margin():
    """The whole interval counts, on either side of 0, and its ends may equal the margin."""
    for low, high, place in (
        (0.11, 0.3, BEYOND),
        (-0.3, -0.11, BEYOND),
        (0.1, 0.3, UNDECIDED),
        (-0.05, 0.1, WITHIN),
        (-0.1, 0.1, WITHIN),
        (-0.11, 0.05, UNDECIDED),
        (-0.3, 0.3, UNDECIDED),
    ):
        assert position_to_margin(low, high, 0.1) == place
    for margin in (0.0, -0.1, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="Invalid margin"):
            check_margin(margin)


def test_the_verdict_names_the_margin():
    beyond, unclear = Difference(0.21, 0.17, 0.25, 0.001, 40), Difference(0.01, -0.03, 0.05, 0.4, 40)
    adds = "the state adds 0.21 ± 0.04 over zeros"
    assert verdict("zeros", beyond, margin=0.1) == f"{adds}, more than the margin of 0.1"
    assert verdict("zeros", beyond, " nats", 0.2) == (
        "the state adds 0.21 ± 0.04 nats over zeros, which may be within the margin of 0.2 nats or beyond it"
    )
    assert verdict("zeros", unclear, margin=0.05).endswith("(+0.01 ± 0.04), within the margin of 0.05")
    few = difference([1.0] * 5, [0.0] * 5, ALONE[:5])
    assert "margin" not in verdict("zeros", few, margin=0.1)


def test_is_clear_uses_the_test_or_else_the_interval():
    """The test decides if there is one with enough histories, and otherwise the interval."""
    assert is_clear(-0.1, 0.3, 0.04, FEWEST) and not is_clear(0.1, 0.3, 0.06, FEWEST)
    assert not is_clear(0.1, 0.3, 0.04, FEWEST - 1) and not Difference(0.2, 0.1, 0.3, 0.04, FEWEST - 1).is_clear
    assert is_clear(0.1, 0.3, None, None) and is_clear(-0.3, -0.1, None, 9) and not is_clear(0.0, 0.3, None, None)


def test_identical_scores_still_have_an_interval():
    """By the rule of three, up to a tenth may succeed if 30 of 30 histories fail."""
    never, always = estimate([0.0] * 30, ALONE[:30]), estimate([1.0] * 60, ALONE[:30] * 2)
    assert (never.mean, never.low, never.high) == (0.0, 0.0, pytest.approx(0.1))
    assert (always.mean, always.low, always.high) == (1.0, pytest.approx(0.9), 1.0)
    apart = difference([1.0] * 30, [0.0] * 30, ALONE[:30])
    assert (apart.low, apart.high) == (pytest.approx(0.9), 1.0) and apart.is_clear


def test_scores_that_differ_by_rounding_are_identical():
    """Three times 0.1 is not 0.3 in floating point, and neither are 0.9 - 0.8 and 0.3 - 0.2 the same."""
    sizes = estimate([0.1] * 4, ["three", "three", "three", "one"])
    assert (sizes.low, sizes.high) == (0.0, 1.0)
    apart = difference([0.9, 0.3, 0.5] * 10, [0.8, 0.2, 0.4] * 10, ALONE[:30])
    assert (apart.low, apart.high) == (pytest.approx(0.0), pytest.approx(0.2))

"""Confidence intervals and tests that keep the questions of one history together.

Questions about one history are not independent. So histories are resampled instead of questions (the cluster
bootstrap), and the paired test flips the signs of whole histories.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltamem_tool.errors import ConfigError
from deltamem_tool.evaluation.scoring.digits import plus_minus
from deltamem_tool.evaluation.scoring.scales import SHARE, Scale

RESAMPLES = 2_000  # number of bootstrap samples
FLIPS = 5_000  # number of sign patterns in the paired test
LEVEL = 0.95
FEWEST = 6  # minimum number of histories for a test: with five, all signs agree by chance in 1 of 16 cases
ALPHA = 0.05  # above this p-value, a difference is called not distinguishable from 0
SMALLEST_P = 0.001  # smallest p-value that is shown as a number
ROUNDING = 1e-9  # smaller differences between scores, or between their sums, are those of floating-point sums
BEYOND, WITHIN, UNDECIDED = "beyond", "within", "undecided"  # where the interval of a difference is beside a margin

Interval = Sequence[float]  # mean, low, high


@dataclass(frozen=True)
class Estimate:
    """A mean and its interval at `LEVEL`."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """A difference of paired means, with its interval, p-value and number of histories."""

    mean: float
    low: float
    high: float
    p_value: float
    histories: int

    @property
    def is_clear(self) -> bool:
        """Whether the difference is distinguishable from 0."""
        return is_clear(self.low, self.high, self.p_value, self.histories)


def is_clear(low: float, high: float, p_value: float | None, histories: int | None) -> bool:
    """Return whether a difference is distinguishable from 0, by the test or else (if None) by its interval."""
    if p_value is None or histories is None:
        return low > 0 or high < 0
    return histories >= FEWEST and p_value < ALPHA


def estimate(
    scores: Sequence[float],
    clusters: Sequence[str],
    seed: int = 0,
    scale: Scale = SHARE,
    weights: Sequence[float] | None = None,
) -> Estimate:
    """Return the mean with the interval of the percentile bootstrap.

    If all histories have the same score, resampling would give an interval of width 0. On a bounded scale, the width is
    then that of the rule of three, 3 / n.

    Args:
        scores: one score per question.
        clusters: history of each question.
        seed: random seed for resampling.
        scale: scale of the scores.
        weights: weight of each score; equal by default.
    """
    sums, counts = _by_cluster(np.asarray(scores, float), clusters, weights)
    mean, low, high = _interval(sums, counts, seed, scale)
    return Estimate(mean, max(low, scale.low), min(high, scale.high))


def difference(
    ours: Sequence[float],
    theirs: Sequence[float],
    clusters: Sequence[str],
    seed: int = 0,
    scale: Scale = SHARE,
    weights: Sequence[float] | None = None,
) -> Difference:
    """Return `ours - theirs`, paired by question, with the interval of `estimate` and a two-sided sign-flip test."""
    sums, counts = _by_cluster(np.asarray(ours, float) - np.asarray(theirs, float), clusters, weights)
    mean, low, high = _interval(sums, counts, seed, scale)
    low, high = max(low, -scale.span), min(high, scale.span)
    return Difference(mean, low, high, _sign_flip(sums, seed), len(sums))


def difference_of_means(ours: Interval, theirs: Interval) -> Estimate:
    """Return `ours - theirs` for two independent samples of which only means and intervals are known.

    The distances between ends and means are squared and added (MOVER; Zou and Donner, 2008, doi 10.1002/sim.3095).
    """
    (mean, low, high), (other, other_low, other_high) = ours, theirs
    shift = mean - other
    return Estimate(
        shift, shift - math.hypot(mean - low, other_high - other), shift + math.hypot(high - mean, other - other_low)
    )


def check_margin(margin: float | None) -> None:
    """Check that a margin, if there is one, is a positive number.

    Raises:
        ConfigError: the margin is not valid.
    """
    if margin is not None and not 0 < margin < math.inf:
        raise ConfigError(
            f"Invalid margin: {margin}.",
            "Differences are compared with it by size.",
            "Choose a number above 0.",
        )


def position_to_margin(low: float, high: float, margin: float) -> str:
    """Return where the interval of a difference lies: BEYOND the margin on one side, WITHIN it, or UNDECIDED."""
    if low > margin or high < -margin:
        return BEYOND
    return WITHIN if -margin <= low and high <= margin else UNDECIDED


def margin_text(low: float, high: float, margin: float | None, unit: str = "") -> str:
    """Return the same as the end of a sentence about the difference; empty without a margin."""
    if margin is None:
        return ""
    size = f"the margin of {margin:g}{unit}"
    words = {
        BEYOND: f"more than {size}",
        WITHIN: f"within {size}",
        UNDECIDED: f"which may be within {size} or beyond it",
    }
    return f", {words[position_to_margin(low, high, margin)]}"


def verdict(against: str, difference: Difference, unit: str = "", margin: float | None = None) -> str:
    """Return the difference as a sentence.

    Args:
        against: name of the other condition.
        difference: difference of the state's scores.
        unit: unit of the difference, with a leading space.
        margin: size that a difference has to exceed to matter, chosen in advance.
    """
    if difference.histories < FEWEST:
        return f"over {against}, {difference.histories} histories are too few for a test ({difference.mean:+.2f}{unit})"
    text = plus_minus(difference.mean, difference.low, difference.high, is_signed=not difference.is_clear)
    beside = margin_text(difference.low, difference.high, margin, unit)
    if not difference.is_clear:
        return f"over {against}, the difference is not distinguishable from 0 ({text}{unit}){beside}"
    word = "adds" if difference.mean > 0 else "costs"
    return f"the state {word} {text}{unit} over {against}{beside}"


def p_value_text(value: float | None, histories: int | None) -> str:
    """Format the p-value of a difference; a dash if there are too few histories or the comparison is not paired."""
    if value is None or histories is None or histories < FEWEST:
        return "–"
    return f"< {SMALLEST_P}" if value < SMALLEST_P else f"{value:.3f}"


def _interval(sums: NDArray[Any], counts: NDArray[Any], seed: int, scale: Scale) -> tuple[float, float, float]:
    """Return the mean and the ends of its interval."""
    mean, of_clusters = float(sums.sum() / counts.sum()), sums / counts
    if np.ptp(of_clusters) < ROUNDING:
        margin = 3 / len(sums) if scale.is_bounded else 0.0
        return mean, mean - margin, mean + margin
    low, high = np.quantile(_resample(sums, counts, seed), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return mean, float(low), float(high)


def _by_cluster(
    scores: NDArray[Any], clusters: Sequence[str], weights: Sequence[float] | None
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the weighted sum of scores and the total weight of each cluster."""
    _, index = np.unique(np.asarray(clusters), return_inverse=True)
    if weights is None:
        return np.bincount(index, scores), np.bincount(index)
    heavy = np.asarray(weights, float)
    return np.bincount(index, scores * heavy), np.bincount(index, heavy)


def _resample(sums: NDArray[Any], counts: NDArray[Any], seed: int) -> NDArray[Any]:
    """Return means `[RESAMPLES]` over clusters drawn with replacement, each over questions: a ratio of sums."""
    draws = _draws(len(sums), seed)
    means: NDArray[Any] = (draws @ sums) / (draws @ counts)
    return means


@lru_cache(maxsize=4)  # the same draws for every condition make their intervals comparable
def _draws(clusters: int, seed: int) -> NDArray[Any]:
    """Return how often each cluster is drawn, `[RESAMPLES, clusters]`."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(clusters, np.full(clusters, 1 / clusters), RESAMPLES).astype(np.float32)


def _sign_flip(sums: NDArray[Any], seed: int) -> float:
    """Return the share of sign patterns, including the observed one, whose sum is at least as far from 0."""
    as_far = np.abs(_signs(len(sums), seed) @ sums) >= abs(sums.sum()) - ROUNDING
    return float((as_far.sum() + 1) / (FLIPS + 1))


@lru_cache(maxsize=4)
def _signs(clusters: int, seed: int) -> NDArray[Any]:
    """Return random signs -1 and 1, `[FLIPS, clusters]`."""
    return (np.random.default_rng(seed).integers(0, 2, (FLIPS, clusters)) * 2 - 1).astype(np.float32)

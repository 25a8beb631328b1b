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

RESAMPLES = 2_000  # of the bootstrap
FLIPS = 5_000  # sign patterns of the paired test
LEVEL = 0.95
FEWEST = 6  # histories: the signs of five, all the same, are chance in 1 of 16
ALPHA = 0.05  # above it, a difference is called not distinguishable from 0
SMALLEST_P = 0.001  # that is shown as a number
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
    """Of paired means: its interval, how often chance alone would do as much, and of how many histories."""

    mean: float
    low: float
    high: float
    p_value: float
    histories: int

    @property
    def is_clear(self) -> bool:
        """Whether it is told from 0."""
        return is_clear(self.low, self.high, self.p_value, self.histories)


def is_clear(low: float, high: float, p_value: float | None, histories: int | None) -> bool:
    """Whether a difference is told from 0: the test decides; without one (None), whether 0 is outside the interval."""
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
    """The mean, with the percentile bootstrap's interval.

    Where all histories score the same, which resampling takes for certainty, it is the rule of three's, 3 / n, if the
    scale has two ends.

    Args:
        scores: one a question.
        clusters: the history of each.
        seed: of the resampling.
        scale: what the scores can be.
        weights: how much each counts; all the same by default.
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
    """`ours - theirs`, question by question, with the interval of `estimate` and a two-sided sign-flip test."""
    sums, counts = _by_cluster(np.asarray(ours, float) - np.asarray(theirs, float), clusters, weights)
    mean, low, high = _interval(sums, counts, seed, scale)
    low, high = max(low, -scale.span), min(high, scale.span)
    return Difference(mean, low, high, _sign_flip(sums, seed), len(sums))


def difference_of_means(ours: Interval, theirs: Interval) -> Estimate:
    """`ours - theirs` of two independent samples of which only means and intervals are known.

    The distances of the ends from their means, squared and added (MOVER; Zou and Donner, 2008, doi 10.1002/sim.3095).
    """
    (mean, low, high), (other, other_low, other_high) = ours, theirs
    shift = mean - other
    return Estimate(
        shift, shift - math.hypot(mean - low, other_high - other), shift + math.hypot(high - mean, other - other_low)
    )


def check_margin(margin: float | None) -> None:
    """Check that a margin, if there is one, is a size.

    Raises:
        ConfigError: it is not.
    """
    if margin is not None and not 0 < margin < math.inf:
        raise ConfigError(
            f"Invalid margin: {margin}.",
            "It is the size with which a difference is compared.",
            "Choose a number above 0.",
        )


def position_to_margin(low: float, high: float, margin: float) -> str:
    """Where the whole interval of a difference is: BEYOND the margin on either side, WITHIN it, or UNDECIDED."""
    if low > margin or high < -margin:
        return BEYOND
    return WITHIN if -margin <= low and high <= margin else UNDECIDED


def margin_text(low: float, high: float, margin: float | None, unit: str = "") -> str:
    """The same as the end of a sentence about the difference; empty without a margin."""
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
    """The difference in words.

    Args:
        against: what it is to.
        difference: of the state's scores.
        unit: what it is counted in, with a space before it.
        margin: what was stated before that it has to exceed to matter.
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
    """Of a difference; where too few histories were tested, or none were paired, a dash."""
    if value is None or histories is None or histories < FEWEST:
        return "–"
    return f"< {SMALLEST_P}" if value < SMALLEST_P else f"{value:.3f}"


def _interval(sums: NDArray[Any], counts: NDArray[Any], seed: int, scale: Scale) -> tuple[float, float, float]:
    """Mean, and the ends of its interval."""
    mean, of_clusters = float(sums.sum() / counts.sum()), sums / counts
    if np.ptp(of_clusters) == 0:
        margin = 3 / len(sums) if scale.is_bounded else 0.0
        return mean, mean - margin, mean + margin
    low, high = np.quantile(_resample(sums, counts, seed), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return mean, float(low), float(high)


def _by_cluster(
    scores: NDArray[Any], clusters: Sequence[str], weights: Sequence[float] | None
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Of each cluster, the sum of its scores, and how many they are; both weighted."""
    _, index = np.unique(np.asarray(clusters), return_inverse=True)
    if weights is None:
        return np.bincount(index, scores), np.bincount(index)
    heavy = np.asarray(weights, float)
    return np.bincount(index, scores * heavy), np.bincount(index, heavy)


def _resample(sums: NDArray[Any], counts: NDArray[Any], seed: int) -> NDArray[Any]:
    """Means `[RESAMPLES]` over clusters drawn with replacement: a mean of questions, so a ratio of sums."""
    draws = _draws(len(sums), seed)
    means: NDArray[Any] = (draws @ sums) / (draws @ counts)
    return means


@lru_cache(maxsize=4)  # the same for every condition, which makes their intervals comparable too
def _draws(clusters: int, seed: int) -> NDArray[Any]:
    """How often each cluster is drawn, `[RESAMPLES, clusters]`."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(clusters, np.full(clusters, 1 / clusters), RESAMPLES).astype(np.float32)


def _sign_flip(sums: NDArray[Any], seed: int) -> float:
    """The share of sign patterns whose sum is at least as far from 0; the pattern that was found is one of them."""
    as_far = np.abs(_signs(len(sums), seed) @ sums) >= abs(sums.sum()) - 1e-9
    return float((as_far.sum() + 1) / (FLIPS + 1))


@lru_cache(maxsize=4)
def _signs(clusters: int, seed: int) -> NDArray[Any]:
    """-1 and 1, `[FLIPS, clusters]`."""
    return (np.random.default_rng(seed).integers(0, 2, (FLIPS, clusters)) * 2 - 1).astype(np.float32)

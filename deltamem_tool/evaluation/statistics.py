"""How sure a figure is: intervals and tests that keep the questions of one history together.

Questions about one history share its luck, so histories are resampled, not questions (the cluster bootstrap), and the
signs of whole histories are flipped in the paired test.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2_000  # of the bootstrap
FLIPS = 5_000  # sign patterns of the paired test
LEVEL = 0.95
FEWEST = 6  # histories: the signs of five, all the same, are chance in 1 of 16
ALPHA = 0.05  # above it, a difference is called not distinguishable from 0

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
        return self.p_value < ALPHA


def estimate(scores: Sequence[float], clusters: Sequence[str], seed: int = 0) -> Estimate:
    """The mean of `scores` from 0 to 1, each of the history that `clusters` names, with the percentile bootstrap's
    interval; where all histories score the same, which resampling takes for certainty, the rule of three's, 3 / n."""
    sums, counts = _by_cluster(np.asarray(scores, float), clusters)
    mean, low, high = _interval(sums, counts, seed)
    return Estimate(mean, max(low, 0.0), min(high, 1.0))


def difference(
    ours: Sequence[float], theirs: Sequence[float], clusters: Sequence[str], seed: int = 0, most: float = 1.0
) -> Difference:
    """`ours - theirs`, question by question, at `most` so large, with the interval of `estimate` and a two-sided
    sign-flip test."""
    sums, counts = _by_cluster(np.asarray(ours, float) - np.asarray(theirs, float), clusters)
    mean, low, high = _interval(sums, counts, seed)
    return Difference(mean, max(low, -most), min(high, most), _sign_flip(sums, seed), len(sums))


def difference_of_means(ours: Interval, theirs: Interval) -> Estimate:
    """`ours - theirs` of two independent samples of which only means and intervals are known: the distances of the
    ends from their means, squared and added (MOVER; Zou and Donner, 2008, doi 10.1002/sim.3095)."""
    (mean, low, high), (other, other_low, other_high) = ours, theirs
    found = mean - other
    return Estimate(
        found, found - math.hypot(mean - low, other_high - other), found + math.hypot(high - mean, other - other_low)
    )


def verdict(against: str, found: Difference) -> str:
    """The difference in words."""
    half = (found.high - found.low) / 2
    if found.histories < FEWEST:
        return f"over {against}, {found.histories} histories are too few for a test ({found.mean:+.2f})"
    if not found.is_clear:
        return f"over {against}, the difference is not distinguishable from 0 ({found.mean:+.2f} ± {half:.2f})"
    word = "adds" if found.mean > 0 else "costs"
    return f"the state {word} {abs(found.mean):.2f} ± {half:.2f} over {against}"


def _interval(sums: NDArray, counts: NDArray, seed: int) -> tuple[float, float, float]:
    """Mean, and the ends of its interval."""
    mean, of_clusters = float(sums.sum() / counts.sum()), sums / counts
    if np.ptp(of_clusters) == 0:
        margin = 3 / len(sums)
        return mean, mean - margin, mean + margin
    low, high = np.quantile(_resampled(sums, counts, seed), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return mean, float(low), float(high)


def _by_cluster(scores: NDArray, clusters: Sequence[str]) -> tuple[NDArray, NDArray]:
    """Sum and number of the scores of each cluster."""
    _, index = np.unique(np.asarray(clusters), return_inverse=True)
    return np.bincount(index, scores), np.bincount(index)


def _resampled(sums: NDArray, counts: NDArray, seed: int) -> NDArray:
    """Means `[RESAMPLES]` over clusters drawn with replacement: a mean of questions, so a ratio of sums."""
    draws = _draws(len(sums), seed)
    return (draws @ sums) / (draws @ counts)


@lru_cache(maxsize=4)  # the same for every condition, which makes their intervals comparable too
def _draws(clusters: int, seed: int) -> NDArray:
    """How often each cluster is drawn, `[RESAMPLES, clusters]`."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(clusters, np.full(clusters, 1 / clusters), RESAMPLES).astype(np.float32)


def _sign_flip(sums: NDArray, seed: int) -> float:
    """The share of sign patterns whose sum is at least as far from 0; the pattern that was found is one of them."""
    as_far = np.abs(_signs(len(sums), seed) @ sums) >= abs(sums.sum()) - 1e-9
    return float((as_far.sum() + 1) / (FLIPS + 1))


@lru_cache(maxsize=4)
def _signs(clusters: int, seed: int) -> NDArray:
    """-1 and 1, `[FLIPS, clusters]`."""
    return (np.random.default_rng(seed).integers(0, 2, (FLIPS, clusters)) * 2 - 1).astype(np.float32)

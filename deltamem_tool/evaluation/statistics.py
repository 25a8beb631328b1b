"""How sure a figure is: intervals and tests that keep the questions of one history together.

Questions about one history share its luck, so histories are resampled, not questions (the cluster bootstrap), and the
signs of whole histories are flipped in the paired test.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2_000  # of the bootstrap
FLIPS = 5_000  # sign patterns of the paired test
LEVEL = 0.95
ALPHA = 0.05  # above it, a difference is called not distinguishable from 0


@dataclass(frozen=True)
class Estimate:
    """A mean and its interval at `LEVEL`."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """Of paired means: its interval, and how often chance alone would do as much."""

    mean: float
    low: float
    high: float
    p_value: float

    @property
    def is_clear(self) -> bool:
        return self.p_value < ALPHA


def estimate(scores: Sequence[float], clusters: Sequence[str], seed: int = 0) -> Estimate:
    """The mean of `scores`, each of the history that `clusters` names, with the percentile bootstrap's interval."""
    sums, counts = _by_cluster(np.asarray(scores, float), clusters)
    means = _resampled(sums, counts, seed)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(sums.sum() / counts.sum()), float(low), float(high))


def difference(ours: Sequence[float], theirs: Sequence[float], clusters: Sequence[str], seed: int = 0) -> Difference:
    """`ours - theirs`, question by question, with the interval of `estimate` and a two-sided sign-flip test."""
    paired = np.asarray(ours, float) - np.asarray(theirs, float)
    found = estimate(paired.tolist(), clusters, seed)
    sums, _ = _by_cluster(paired, clusters)
    return Difference(found.mean, found.low, found.high, _sign_flip(sums, seed))


def verdict(against: str, found: Difference) -> str:
    """The difference in words."""
    half = (found.high - found.low) / 2
    if not found.is_clear:
        return f"over {against}, the difference is not distinguishable from 0 ({found.mean:+.2f} ± {half:.2f})"
    word = "adds" if found.mean > 0 else "costs"
    return f"the state {word} {abs(found.mean):.2f} ± {half:.2f} over {against}"


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

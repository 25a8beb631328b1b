"""Properties of a metric: the bounds of its values, the unit of its differences, and its perplexity."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

LOG_PROB = "log_prob"  # mean log-probability of a token of the answer, in nats
TOKENS = "tokens"  # of the answer: what a log_prob is the mean of, beside it in the scores
PERPLEXITY = "perplexity"


@dataclass(frozen=True)
class Scale:
    """From `low` to `high`; higher is better.

    Args:
        unit: of a difference, with a space before it.
        weight: the name of the score that says how much an item counts; empty where all count the same.
    """

    low: float = 0.0
    high: float = 1.0
    unit: str = ""
    weight: str = ""

    @property
    def is_bounded(self) -> bool:
        """Whether it has two ends."""
        return math.isfinite(self.low) and math.isfinite(self.high)

    @property
    def span(self) -> float:
        """The largest difference."""
        return self.high - self.low

    @property
    def of_differences(self) -> Scale:
        """Of differences on this scale."""
        return replace(self, low=-self.span, high=self.span)


SHARE = Scale()  # of every metric that is not in SCALES
SCALES = {LOG_PROB: Scale(-math.inf, 0.0, " nats per token", TOKENS)}


def scale_of(metric: str) -> Scale:
    """The scale of a metric."""
    return SCALES.get(metric, SHARE)


def perplexity(log_prob: float) -> float:
    """Exp of the mean negative log-probability of a token."""
    return math.exp(-log_prob)

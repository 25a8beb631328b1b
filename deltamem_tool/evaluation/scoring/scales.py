"""Properties of a metric: the bounds of its values, the unit of its differences, and its perplexity."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

LOG_PROB = "log_prob"  # mean log-probability of a token of the answer, in nats
TOKENS = "tokens"  # number of tokens of the answer, over which log_prob is the mean
PERPLEXITY = "perplexity"


@dataclass(frozen=True)
class Scale:
    """A scale from `low` to `high`; higher is better.

    Args:
        unit: unit of a difference, with a leading space.
        weight: name of the score with the weight of an item; empty if all items have the same weight.
    """

    low: float = 0.0
    high: float = 1.0
    unit: str = ""
    weight: str = ""

    @property
    def is_bounded(self) -> bool:
        """Whether both ends are finite."""
        return math.isfinite(self.low) and math.isfinite(self.high)

    @property
    def span(self) -> float:
        """The largest possible difference."""
        return self.high - self.low

    @property
    def of_differences(self) -> Scale:
        """The scale of differences on this scale."""
        return replace(self, low=-self.span, high=self.span)


SHARE = Scale()  # the scale of every metric that is not in SCALES
SCALES = {LOG_PROB: Scale(-math.inf, 0.0, " nats per token", TOKENS)}


def scale_of(metric: str) -> Scale:
    """Return the scale of a metric."""
    return SCALES.get(metric, SHARE)


def perplexity(log_prob: float) -> float:
    """Return the exponential of the mean negative log-probability per token."""
    return math.exp(-log_prob)

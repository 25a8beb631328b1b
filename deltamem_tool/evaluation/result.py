"""The result of an evaluation: all answers, and the figures computed from them."""

from __future__ import annotations

from dataclasses import dataclass

from deltamem_tool.evaluation.conditions import PYTORCH, STATE, Condition, readable_name
from deltamem_tool.evaluation.records import Record
from deltamem_tool.evaluation.scoring.scales import scale_of
from deltamem_tool.evaluation.scoring.statistics import Difference, Estimate, difference, estimate, verdict


@dataclass(frozen=True)
class Evaluation:
    """All answers of an evaluation, and the figures computed from them."""

    task: str
    protocol: str
    metrics: list[str]  # the first decides
    conditions: list[Condition]
    groups: list[str]
    records: list[Record]
    seed: int
    asked: int = 0  # number of records from this run; the others are from an earlier one
    runtime: str = PYTORCH
    margin: float | None = None  # size that a difference has to exceed to matter, chosen in advance

    def scores(self, metric: str, condition: str, group: str | None = None) -> tuple[list[float], list[str]]:
        """Return the score and the history of each question, of one group or of all, in the order of the items."""
        some = [r for r in self.records if r.condition == condition and group in (None, r.group)]
        return [record.scores[metric] for record in some], [record.history for record in some]

    def weights(self, metric: str, condition: str, group: str | None = None) -> list[float] | None:
        """Return the weight of each of `scores`; None if all weigh the same."""
        weight = scale_of(metric).weight
        return self.scores(weight, condition, group)[0] if weight else None

    def estimate(self, metric: str, condition: str, group: str | None = None) -> Estimate:
        """Return the mean of a metric under a condition, with its interval."""
        weights = self.weights(metric, condition, group)
        return estimate(*self.scores(metric, condition, group), self.seed, scale_of(metric), weights)

    def difference(self, metric: str, other: str, group: str | None = None) -> Difference:
        """Return the difference between the scores of the state and of another condition, paired by question."""
        ours, histories = self.scores(metric, STATE, group)
        theirs, weights = self.scores(metric, other, group)[0], self.weights(metric, STATE, group)
        return difference(ours, theirs, histories, self.seed, scale_of(metric), weights)

    def verdict(self) -> list[str]:
        """Return the gain of the state over each other condition as sentences."""
        metric = self.metrics[0]
        unit = scale_of(metric).unit
        return [
            verdict(readable_name(name), self.difference(metric, name), unit, self.margin)
            for name in self.other_conditions
        ]

    @property
    def other_conditions(self) -> list[str]:
        """The other conditions, with which the state is compared; none if the state was left out."""
        names = [condition.name for condition in self.conditions]
        return [name for name in names if name != STATE] if STATE in names else []

"""Compare two evaluations of the same task, question by question if both have asked the same ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

from deltamem_tool._version import __version__
from deltamem_tool.errors import DataError
from deltamem_tool.evaluation.conditions import STATE, readable_name
from deltamem_tool.evaluation.records import ITEMS, RECORDS_FILE, SETTINGS_FILE, Record, read_records
from deltamem_tool.evaluation.report.evaluation_file import EVALUATION_FILE, read_evaluation
from deltamem_tool.evaluation.report.settings import COST, settings
from deltamem_tool.evaluation.scoring.digits import plus_minus
from deltamem_tool.evaluation.scoring.scales import scale_of
from deltamem_tool.evaluation.scoring.statistics import (
    FEWEST,
    Interval,
    check_margin,
    difference,
    difference_of_means,
    is_clear,
    margin_text,
    position_to_margin,
)
from deltamem_tool.io.names import expand_user
from deltamem_tool.io.safe_json import read_json

FORMAT, FORMAT_VERSION = "deltamem-comparison", 1
_ROUNDING = 1e-9  # tolerance for a mean read back from JSON


@dataclass(frozen=True)
class EvaluationFile:
    """One of the two evaluations: its results, and its records if they are complete.

    Args:
        missing: why there are no records; empty if there are.
        items: digest of the questions and histories.
    """

    place: Path
    result: Mapping[str, Any]
    records: Mapping[str, Sequence[Record]]
    items: str
    missing: str

    def score(self, condition: str, group: str | None) -> Interval:
        """Return the mean of a condition, and the bounds of its interval."""
        if group is None:
            return cast(Interval, self.result["overall"][condition])
        return cast(Interval, self.result["scores"][condition][self.result["groups"].index(group)])


@dataclass(frozen=True)
class Row:
    """B minus A.

    Args:
        condition: the condition whose scores are compared; with `is_gain`, the one over which the gain of the state is
            compared.
        group: name of the group; None for all questions.
        p_value, histories: None if the comparison is not paired.
        margin: size that a difference has to exceed to matter.
    """

    condition: str
    is_gain: bool
    group: str | None
    a: Interval
    b: Interval
    mean: float
    low: float
    high: float
    p_value: float | None = None
    histories: int | None = None
    unit: str = ""
    margin: float | None = None

    @property
    def label(self) -> str:
        """The condition in words, or the gain of the state over it."""
        return f"state over {readable_name(self.condition)}" if self.is_gain else readable_name(self.condition)

    @property
    def sentence(self) -> str:
        """The difference as a sentence."""
        where = self.label if self.group is None else f"{self.group}, {self.label}"
        if self.histories is not None and self.histories < FEWEST:
            return f"{where}: {self.histories} histories are too few for a test ({self.mean:+.2f}{self.unit})"
        size = plus_minus(self.mean, self.low, self.high, is_signed=not self.is_clear)
        beside = margin_text(self.low, self.high, self.margin, self.unit)
        if not self.is_clear:
            return f"{where}: the difference is not distinguishable from 0 ({size}{self.unit}){beside}"
        word = "higher" if self.mean > 0 else "lower"
        return f"{where}: B is {size}{self.unit} {word} than A{beside}"

    @property
    def is_clear(self) -> bool:
        """Whether the difference is distinguishable from 0."""
        return is_clear(self.low, self.high, self.p_value, self.histories)

    def to_json(self) -> dict[str, Any]:
        """Return the row, and its position relative to the margin if there is one and enough histories."""
        if self.margin is None or (self.histories is not None and self.histories < FEWEST):
            return asdict(self)
        return {**asdict(self), "beside_margin": position_to_margin(self.low, self.high, self.margin)}


@dataclass(frozen=True)
class Comparison:
    """B minus A.

    Args:
        unpaired: why questions could not be paired; empty if they were.
        groups: groups that both have.
        differing: settings that differ, as (heading, name, A's, B's).
        alone: conditions and groups that only one has, as remarks.
        rows: by condition; all questions first, if both have the same groups, then group by group.
        gains: gain of the state over each other condition, B's minus A's, over all questions.
    """

    a: EvaluationFile
    b: EvaluationFile
    unpaired: str
    groups: list[str]
    differing: list[tuple[str, str, str, str]]
    alone: list[str]
    rows: list[Row]
    gains: list[Row]

    @property
    def metric(self) -> str:
        """The metric of both evaluations."""
        return str(self.a.result["metric"])

    @property
    def notes(self) -> list[str]:
        """Remarks that are needed to read the differences."""
        if self.unpaired:
            notes = [f"not paired by question, since {self.unpaired}: means are compared as independent samples"]
        else:
            notes = [f"paired by question ({sum(self.a.result['questions'])} questions)"]
        if not self.overall:
            notes.append("their groups differ, so there is no comparison over all questions")
        silent = [label for label, one in (("A", self.a), ("B", self.b)) if "run" not in one.result]
        return [*notes, *(f"{label} does not record how it was run" for label in silent), *self.alone]

    def verdict(self) -> list[str]:
        """Return the differences as sentences: over all questions or else by group, then the gain of the state."""
        return [row.sentence for row in [*(self.overall or self.rows), *self.gains]]

    @property
    def overall(self) -> list[Row]:
        """The rows of all questions."""
        return [row for row in self.rows if row.group is None]

    def to_json(self) -> dict[str, Any]:
        """Return the comparison as `deltamem compare --json` prints it."""
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "deltamem_version": __version__,
            "task": self.a.result["task"],
            "metric": self.metric,
            "a": {
                "place": str(self.a.place),
                "adapter": self.a.result["adapter"],
                "protocol": self.a.result["protocol"],
            },
            "b": {
                "place": str(self.b.place),
                "adapter": self.b.result["adapter"],
                "protocol": self.b.result["protocol"],
            },
            "paired": not self.unpaired,
            "settings_that_differ": [
                {"part": part, "name": name, "a": a, "b": b} for part, name, a, b in self.differing
            ],
            "notes": self.notes,
            "differences": [row.to_json() for row in [*self.rows, *self.gains]],
            "verdict": self.verdict(),
        }


def compare(a: str | Path, b: str | Path, margin: float | None = None) -> Comparison:
    """Compare two reports.

    Args:
        a: folder of a report, or its `evaluation.json`.
        b: likewise.
        margin: size that a difference has to exceed to matter.

    Raises:
        ConfigError: `margin` is not valid.
        DataError: a report cannot be read, or the two measure different things.
    """
    check_margin(margin)
    first, second = read_report(expand_user(a)), read_report(expand_user(b))
    unpaired = _unpaired_reason(first, second)
    _check_alike(first, second, unpaired)
    groups = [group for group in first.result["groups"] if group in second.result["groups"]]
    conditions = [name for name in first.result["conditions"] if name in second.result["conditions"]]
    # With different groups, the means over all questions would measure different things.
    same_groups = len(groups) == len(first.result["groups"]) == len(second.result["groups"])
    rows = [
        _row(first, second, name, group, not unpaired)
        for group in [*([None] if same_groups else []), *groups]
        for name in conditions
    ]
    gains = _gains(first, second, conditions, not unpaired) if same_groups else []
    rows, gains = ([replace(row, margin=margin) for row in each] for each in (rows, gains))
    return Comparison(
        first,
        second,
        unpaired,
        groups,
        _differing_settings(first, second),
        _one_sided_notes(first, second),
        rows,
        gains,
    )


def read_report(place: Path) -> EvaluationFile:
    """Read a report's figures, and its records if the figures are computed from them.

    Raises:
        DataError: there is no evaluation, or a file is damaged.
    """
    file = place / EVALUATION_FILE if place.is_dir() else place
    if not file.is_file():
        why = f"There is no {EVALUATION_FILE} in it." if place.is_dir() else "There is no such file or folder."
        raise DataError(f"{place} is not a report.", why, "Use a folder written by `deltamem eval --report`.")
    result, folder = read_evaluation(file), file.parent
    if not all((folder / name).is_file() for name in (RECORDS_FILE, SETTINGS_FILE)):
        return EvaluationFile(place, result, {}, "", f"{place} has no records")
    try:
        about = read_json(folder / SETTINGS_FILE)
    except ValueError as error:
        raise DataError(f"{folder / SETTINGS_FILE} is damaged.", f"{error}.", "Evaluate again.") from error
    records = _by_condition(read_records(folder / RECORDS_FILE), result)
    if not isinstance(about, dict) or any(about.get(name) != result[name] for name in ("task", "protocol", "adapter")):
        return EvaluationFile(place, result, {}, "", f"the records in {folder} belong to another evaluation")
    missing = "" if _agree(records, result) else f"the records in {folder} do not match {EVALUATION_FILE}"
    return EvaluationFile(place, result, {} if missing else records, str(about.get(ITEMS, "")), missing)


def _by_condition(records: Sequence[Record], result: Mapping[str, Any]) -> dict[str, list[Record]]:
    """Return the records by condition, sorted by item; the file has them in the order of their prompts' lengths."""
    by_condition: dict[str, list[Record]] = {name: [] for name in result["conditions"]}
    for record in sorted(records, key=lambda record: record.item):
        if record.condition in by_condition:
            by_condition[record.condition].append(record)
    return by_condition


def _agree(records: Mapping[str, Sequence[Record]], result: Mapping[str, Any]) -> bool:
    """Return whether the records give the means of the result, so that none is missing or changed."""
    metric, total = result["metric"], sum(result["questions"])
    weight = scale_of(metric).weight
    for name, answers in records.items():
        scores = [record.scores.get(metric) for record in answers]
        weights = [record.scores.get(weight) if weight else 1.0 for record in answers]
        if not answers or len({record.item for record in answers}) != len(answers) or len(answers) != total:
            return False
        numbers = [
            (score, weight)
            for score, weight in zip(scores, weights, strict=True)
            if isinstance(score, int | float) and isinstance(weight, int | float) and weight > 0
        ]
        if len(numbers) != len(answers):
            return False
        mean = sum(score * weight for score, weight in numbers) / sum(weight for _, weight in numbers)
        if not math.isclose(mean, result["overall"][name][0], rel_tol=_ROUNDING, abs_tol=_ROUNDING):
            return False
    return True


def _unpaired_reason(a: EvaluationFile, b: EvaluationFile) -> str:
    """Return why questions cannot be paired; empty if they can."""
    if a.missing or b.missing:
        return a.missing or b.missing
    return "" if a.items and a.items == b.items else "they asked different questions"


def _check_alike(a: EvaluationFile, b: EvaluationFile, unpaired: str) -> None:
    """Reject two evaluations whose difference means nothing.

    Raises:
        DataError: the evaluations measure different things, or have nothing in common.
    """
    for name in ("task", "metric"):
        if a.result[name] != b.result[name]:
            raise DataError(
                f"{a.place} and {b.place} have different {name}s: {a.result[name]} and {b.result[name]}.",
                "Their results measure different things.",
                f"Compare evaluations with the same {name}.",
            )
    if unpaired and a.result["protocol"] != b.result["protocol"]:
        raise DataError(
            f"{a.place} and {b.place} have different protocols: {a.result['protocol']} and {b.result['protocol']}.",
            f"They cannot even be compared question by question: {unpaired}.",
            "Ask both the same questions with `deltamem eval --report`.",
        )
    for name in ("conditions", "groups"):
        if not set(a.result[name]) & set(b.result[name]):
            raise DataError(f"{a.place} and {b.place} have no {name} in common.", "", "Compare other evaluations.")


def _row(a: EvaluationFile, b: EvaluationFile, name: str, group: str | None, paired: bool) -> Row:
    of_a, of_b, scale = a.score(name, group), b.score(name, group), scale_of(a.result["metric"])
    if not paired:
        return Row(name, False, group, of_a, of_b, **asdict(difference_of_means(of_b, of_a)), unit=scale.unit)
    ours, theirs, histories, weights = _pair_scores(a, b, name, group)
    estimate = difference(ours, theirs, histories, a.result["seed"], scale, weights)
    return Row(name, False, group, of_a, of_b, **asdict(estimate), unit=scale.unit)


def _pair_scores(
    a: EvaluationFile, b: EvaluationFile, name: str, group: str | None
) -> tuple[list[float], list[float], list[str], list[float] | None]:
    """Return B's scores, A's scores, the histories and the weights, by question."""
    metric, weight = a.result["metric"], scale_of(a.result["metric"]).weight
    pairs = zip(a.records[name], b.records[name], strict=True)
    some = [(first, second) for first, second in pairs if group in (None, first.group)]
    return (
        [second.scores[metric] for _, second in some],
        [first.scores[metric] for first, _ in some],
        [first.history for first, _ in some],
        [first.scores[weight] for first, _ in some] if weight else None,
    )


def _gains(a: EvaluationFile, b: EvaluationFile, conditions: Sequence[str], paired: bool) -> list[Row]:
    """Return how much more the state adds in B than in A: differences between differences."""
    scale = scale_of(a.result["metric"])
    rows = []
    for other in conditions if STATE in conditions else ():
        of_a, of_b = (_interval(each.result.get("differences", {}).get(other)) for each in (a, b))
        if of_a is None or of_b is None:
            continue
        if paired:
            (b_state, a_state, histories, weights), (b_other, a_other, *_) = (
                _pair_scores(a, b, condition, None) for condition in (STATE, other)
            )
            b_gain = [state - control for state, control in zip(b_state, b_other, strict=True)]
            a_gain = [state - control for state, control in zip(a_state, a_other, strict=True)]
            over = asdict(difference(b_gain, a_gain, histories, a.result["seed"], scale.of_differences, weights))
        else:
            over = asdict(difference_of_means(of_b, of_a))
        rows.append(Row(other, True, None, of_a, of_b, **over, unit=scale.unit))
    return rows


def _interval(result: Mapping[str, Any] | None) -> Interval | None:
    return None if result is None else [result["mean"], result["low"], result["high"]]


def _differing_settings(a: EvaluationFile, b: EvaluationFile) -> list[tuple[str, str, str, str]]:
    """Return the settings that differ.

    Settings that only one of them has are included if both record how they were run.
    """
    sides = [{(part, name): value for part, rows in settings(each.result) for name, value in rows} for each in (a, b)]
    both_have_runs = "run" in a.result and "run" in b.result
    keys = [
        key for key in dict.fromkeys([*sides[0], *sides[1]]) if both_have_runs or (key in sides[0] and key in sides[1])
    ]
    rows = [(*key, sides[0].get(key, "–"), sides[1].get(key, "–")) for key in keys if key[0] != COST]
    return [row for row in rows if row[2] != row[3]]


def _one_sided_notes(a: EvaluationFile, b: EvaluationFile) -> list[str]:
    """Return the conditions and groups that only one evaluation has, as remarks."""
    return [
        f"only {label} has the {kind} {readable_name(name)}"
        for kind, key in (("condition", "conditions"), ("group", "groups"))
        for label, one, other in (("A", a, b), ("B", b, a))
        for name in one.result[key]
        if name not in other.result[key]
    ]

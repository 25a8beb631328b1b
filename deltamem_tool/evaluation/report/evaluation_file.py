"""Write and read `evaluation.json`: the results of an evaluation and the adapter they belong to.

Its `run` section, which says how to repeat the evaluation, comes from `evaluation.run_info`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltamem_tool._version import __version__
from deltamem_tool.errors import DataError
from deltamem_tool.evaluation.scoring.scales import LOG_PROB, PERPLEXITY, perplexity
from deltamem_tool.evaluation.scoring.statistics import FEWEST, Difference, position_to_margin
from deltamem_tool.io.atomic import write_atomically
from deltamem_tool.io.formats import is_newer, update_command
from deltamem_tool.io.safe_json import read_json

if TYPE_CHECKING:
    from deltamem_tool.evaluation.result import Evaluation

EVALUATION_FILE = "evaluation.json"
FORMAT, FORMAT_VERSION = "deltamem-evaluation", 1
_ENDS = ("mean", "low", "high")  # fields of a difference
_PARTS = ("options", "mechanism", "versions")  # sections of `run` that readers show
_AGAIN = "Create it with `deltamem eval ADAPTER --out evaluation.json`."


def write_evaluation(path: str | Path, result: Mapping[str, Any]) -> None:
    """Write the result of `evaluation_json`, completely or not at all."""
    write_atomically(path, (json.dumps(result, indent=1) + "\n").encode())


def evaluation_json(
    evaluation: Evaluation, adapter: str, arguments: Sequence[str], run: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the content of the file.

    `scores` has a list of `[mean, low, high]` by condition, one per group. `overall` has `[mean, low, high]` over all
    questions by condition. `other_scores` and `other_metrics` have the same for the other metrics.

    Args:
        evaluation: the result of `evaluate`.
        adapter: fingerprint of the evaluated adapter.
        arguments: arguments with which `deltamem eval` asks the same questions.
        run: how the evaluation was run, as returned by `run_json`.
    """
    metric, *others = evaluation.metrics
    names = [condition.name for condition in evaluation.conditions]
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "deltamem_version": __version__,
        "adapter": adapter,
        "task": evaluation.task,
        "protocol": evaluation.protocol,
        "arguments": list(arguments),
        "metric": metric,
        "seed": evaluation.seed,
        "groups": evaluation.groups,
        "questions": [len(evaluation.scores(metric, names[0], group)[0]) for group in evaluation.groups],
        "conditions": {condition.name: condition.meaning for condition in evaluation.conditions},
        "scores": {name: [_row(evaluation, metric, name, group) for group in evaluation.groups] for name in names},
        "overall": {name: _row(evaluation, metric, name, None) for name in names},
        "other_scores": {
            other: {name: [_row(evaluation, other, name, group) for group in evaluation.groups] for name in names}
            for other in others
        },
        "other_metrics": {other: {name: _row(evaluation, other, name, None) for name in names} for other in others}
        | ({PERPLEXITY: {name: _perplexities(evaluation, name) for name in names}} if metric == LOG_PROB else {}),
        "differences": _differences(evaluation, None),
        "group_differences": {group: _differences(evaluation, group) for group in evaluation.groups},
        "verdict": evaluation.verdict(),
        **({} if evaluation.margin is None else {"margin": evaluation.margin}),
        **({} if run is None else {"run": dict(run)}),
    }


def _differences(evaluation: Evaluation, group: str | None) -> dict[str, Any]:
    """Return the differences between the state and each other condition."""
    differences = {
        name: evaluation.difference(evaluation.metrics[0], name, group) for name in evaluation.other_conditions
    }
    return {name: {**asdict(one), **_margin_fields(one, evaluation.margin)} for name, one in differences.items()}


def _margin_fields(one: Difference, margin: float | None) -> dict[str, str]:
    """Return the position relative to the margin; empty without a margin, or with too few histories for a test."""
    if margin is None or one.histories < FEWEST:
        return {}
    return {"beside_margin": position_to_margin(one.low, one.high, margin)}


def _row(evaluation: Evaluation, metric: str, condition: str, group: str | None) -> list[float]:
    estimate = evaluation.estimate(metric, condition, group)
    return [estimate.mean, estimate.low, estimate.high]


def _perplexities(evaluation: Evaluation, condition: str) -> list[float]:
    mean, low, high = _row(evaluation, LOG_PROB, condition, None)
    return [perplexity(mean), perplexity(high), perplexity(low)]


def read_evaluation(file: Path) -> dict[str, Any]:
    """Read what `write_evaluation` wrote.

    Raises:
        DataError: the file is not an evaluation, has a newer format, or lacks a result.
    """
    try:
        result = read_json(file)
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read.", f"{error}.", _AGAIN) from error
    if not isinstance(result, dict) or result.get("format") != FORMAT:
        raise DataError(f"{file} is not an evaluation of an adapter.", "", _AGAIN)
    if is_newer(result.get("format_version"), FORMAT_VERSION):
        update = update_command(result.get("deltamem_version"))
        raise DataError(f"{file} has a newer format.", "", f"Update deltamem-tool: {update}")
    if not _is_complete(result):
        raise DataError(f"{file} is incomplete.", "It lacks results of the evaluation.", _AGAIN)
    return result


def _is_complete(result: dict[str, Any]) -> bool:
    """Return whether the file has everything that readers, such as the model card, show."""
    texts = [result.get(name) for name in ("adapter", "task", "protocol", "metric")]
    groups, conditions, scores = result.get("groups"), result.get("conditions"), result.get("scores")
    if not isinstance(groups, list) or not isinstance(conditions, dict) or not isinstance(scores, dict):
        return False
    verdict, overall, arguments = result.get("verdict"), result.get("overall"), result.get("arguments")
    if not isinstance(verdict, list) or not isinstance(arguments, list) or type(result.get("seed")) is not int:
        return False
    differences, run = result.get("differences", {}), result.get("run", {})
    if not isinstance(differences, dict) or not isinstance(run, dict):
        return False
    return (
        all(isinstance(text, str) for text in [*texts, *groups, *conditions.values(), *verdict, *arguments])
        and _are_numbers(result.get("questions"), len(groups))
        and isinstance(overall, dict)
        and all(_are_numbers(overall.get(name), 3) for name in conditions)
        and all(isinstance(scores.get(name), list) and len(scores[name]) == len(groups) for name in conditions)
        and all(_are_numbers(row, 3) for name in conditions for row in scores[name])
        and all(isinstance(one, dict) for one in differences.values())
        and all(_are_numbers([one.get(end) for end in _ENDS], 3) for one in differences.values())
        and all(isinstance(run.get(part, {}), dict) for part in _PARTS)
    )


def _are_numbers(values: Any, length: int) -> bool:
    return (
        isinstance(values, list)
        and len(values) == length
        and all(type(value) in (int, float) and math.isfinite(value) for value in values)
    )

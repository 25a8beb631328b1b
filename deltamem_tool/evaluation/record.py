"""`evaluation.json`: what an evaluation found, of which adapter, so that others can read and compare it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltamem_tool import __version__
from deltamem_tool.bounded import read_json
from deltamem_tool.errors import DataError

if TYPE_CHECKING:
    from deltamem_tool.evaluation.recall import RecallResult

EVALUATION_FILE = "evaluation.json"
RECALL = "recall"


def recall_json(result: RecallResult) -> dict[str, Any]:
    """`{"facts": […], condition: […], "intervals": {condition: [[low, high], …]}, …}`."""
    from deltamem_tool.evaluation.recall import CONDITIONS

    return {
        "facts": result.facts,
        **{condition: [score.mean for score in scores] for condition, scores in result.scores.items()},
        "intervals": {name: [[score.low, score.high] for score in scores] for name, scores in result.scores.items()},
        "conditions": {name: CONDITIONS[name] for name in result.scores},
        "episodes": result.episodes,
        "seed": result.seed,
    }


def evaluation_json(result: RecallResult, adapter: str) -> dict[str, Any]:
    """What the file holds; `adapter` is the fingerprint of what was evaluated."""
    return {"task": RECALL, "adapter": adapter, "deltamem_version": __version__, **recall_json(result)}


def read_evaluation(file: Path) -> dict[str, Any]:
    """What `evaluation_json` gave.

    Raises:
        DataError: the file is something else, or a figure is missing.
    """
    try:
        said = read_json(file)
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read.", f"{error}.", _AGAIN) from error
    if not isinstance(said, dict) or said.get("task") != RECALL or not isinstance(said.get("adapter"), str):
        raise DataError(f"{file} is no evaluation of an adapter.", "", _AGAIN)
    facts, conditions, intervals = said.get("facts"), said.get("conditions"), said.get("intervals")
    fits = (
        isinstance(facts, list)
        and all(type(count) is int for count in facts)
        and isinstance(conditions, dict)
        and isinstance(intervals, dict)
        and type(said.get("episodes")) is int
        and type(said.get("seed")) is int
        and all(_is_row(said.get(name), len(facts)) for name in conditions)
        and all(
            isinstance(intervals.get(name), list)
            and len(intervals[name]) == len(facts)
            and all(_is_row(ends, 2) for ends in intervals[name])
            for name in conditions
        )
    )
    if not fits:
        raise DataError(f"{file} lacks figures of an evaluation.", "", _AGAIN)
    return said


_AGAIN = "Make it with `deltamem eval ADAPTER --out evaluation.json`."


def _is_row(values: Any, length: int) -> bool:
    return (
        isinstance(values, list)
        and len(values) == length
        and all(type(value) in (int, float) and math.isfinite(value) for value in values)
    )

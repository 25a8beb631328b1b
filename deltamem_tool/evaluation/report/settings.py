"""The settings of an evaluation as rows of text, to list on a page and to compare two evaluations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deltamem_tool.evaluation.conditions import in_words

COST = "Cost"  # a part of the settings: what a run has taken


def settings(result: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """All that `evaluation.json` says of how it was done, as readable rows under headings."""
    common = {name: result[name] for name in ("task", "protocol", "metric", "seed")}
    run = result.get("run") or {}
    parts = {
        "Evaluation": {**common, **run.get("options", {})},
        "Adapter": {"fingerprint": result["adapter"], **run.get("mechanism", {})},
        "Base model": run.get("base") or {},
        "Versions": run.get("versions", {}),
        COST: _cost(run.get("cost")),
    }
    return [
        (heading, [(in_words(name), readable(value)) for name, value in rows.items()])
        for heading, rows in parts.items()
        if rows
    ]


def _cost(cost: Mapping[str, Any] | None) -> dict[str, Any]:
    if cost is None:
        return {}
    asked, answers = cost["asked"], cost["answers"]
    earlier = "" if asked == answers else f" (the other {answers - asked:,} were there from an earlier run)"
    return {
        "time": f"{cost['seconds']:,.0f} s for {asked:,} answers{earlier}, the model's loading not counted",
        "prompts": f"{cost['prompt_tokens']:,} tokens in all; histories that were written are not counted",
    }


def readable(value: Any) -> str:
    """A value in words."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(readable, value))
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {readable(part)}" for name, part in value.items())
    return str(value)

"""Turn the settings of an evaluation into rows of text, to list them on a page and to compare two evaluations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deltamem_tool.evaluation.conditions import readable_name

COST = "Cost"  # the part of the settings with the time and tokens that a run took


def settings(result: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return all settings in `evaluation.json` as readable rows under headings."""
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
        (heading, [(readable_name(name), value_text(value)) for name, value in rows.items()])
        for heading, rows in parts.items()
        if rows
    ]


def _cost(cost: Mapping[str, Any] | None) -> dict[str, Any]:
    if cost is None:
        return {}
    asked, answers = cost["asked"], cost["answers"]
    earlier = "" if asked == answers else f" (the other {answers - asked:,} came from an earlier run)"
    return {
        "time": f"{cost['seconds']:,.0f} s for {asked:,} answers{earlier}, without loading the model",
        "prompts": f"{cost['prompt_tokens']:,} tokens in total, without the histories written into the memory",
    }


def value_text(value: Any) -> str:
    """Return a value as readable text."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(value_text, value))
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {value_text(part)}" for name, part in value.items())
    return str(value)

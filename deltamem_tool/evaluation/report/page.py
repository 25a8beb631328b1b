"""Write the folder of a report: an HTML page, the same in Markdown, and the results as JSON, next to the records."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from deltamem_tool.errors import DataError
from deltamem_tool.evaluation.conditions import STATE, readable_name
from deltamem_tool.evaluation.records import RECORDS_FILE, SETTINGS_FILE, Record
from deltamem_tool.evaluation.report.drawing import DARK, differences_figure, scores_figure, svg
from deltamem_tool.evaluation.report.evaluation_file import EVALUATION_FILE, write_evaluation
from deltamem_tool.evaluation.report.settings import settings
from deltamem_tool.evaluation.report.templating import render_template
from deltamem_tool.evaluation.scoring.statistics import FEWEST, is_clear
from deltamem_tool.io.atomic import check_writable, write_atomically

PAGE_FILE, MARKDOWN_FILE = "index.html", "report.md"
FILES = {
    PAGE_FILE: "this page",
    MARKDOWN_FILE: "the same in Markdown",
    EVALUATION_FILE: "all results",
    RECORDS_FILE: "every question and answer, one per line",
    SETTINGS_FILE: "the settings behind the records",
}
SAMPLE_GROUPS = 8  # maximum number of groups with answers on the page


def check_folder(folder: Path) -> None:
    """Check that a report can be written into `folder` and would only replace files of an earlier report.

    Raises:
        DeltaMemError: the folder cannot be written, or holds files of another program.
    """
    check_writable(folder / PAGE_FILE)
    if (folder / SETTINGS_FILE).is_file():
        return  # a report or records; whether they belong to this evaluation is checked when they are opened
    report_files = [name for name in FILES if (folder / name).exists()]
    if report_files:
        problem = f"{folder} holds {' and '.join(report_files)} from something else."
        raise DataError(problem, "A report would overwrite it.", "Choose another folder.")


def write_report(folder: Path, result: Mapping[str, Any], records: Sequence[Record]) -> None:
    """Write all files except for the records, which exist already. The page, which links the others, comes last.

    Args:
        folder: folder that has the records.
        result: the result of `evaluation_json`.
        records: the records in the folder.
    """
    values = _template_values(result, records)
    write_evaluation(folder / EVALUATION_FILE, result)
    write_atomically(folder / MARKDOWN_FILE, render_template("report.md.jinja", **values))
    write_atomically(folder / PAGE_FILE, render_template("report.html.jinja", **values))


def _template_values(result: Mapping[str, Any], records: Sequence[Record]) -> dict[str, Any]:
    run = result.get("run")
    return {
        "dark": DARK,
        "result": result,
        "run": run,
        "created": run["created"][:16].replace("T", " ") + " UTC" if run else "",
        "state": STATE,
        "total": sum(result["questions"]),
        "histories": len({record.history for record in records}),
        "meanings": [(readable_name(name), meaning) for name, meaning in result["conditions"].items()],
        "command": shlex.join(run["command"]) if run else "",
        "settings": settings(result),
        "fewest": FEWEST,
        "files": [(name, meaning) for name, meaning in FILES.items() if name != PAGE_FILE],
        "records_file": RECORDS_FILE,
        "sample": _sample(result, records),
        "shown_groups": SAMPLE_GROUPS,
        "left_out": len(result["groups"]) > SAMPLE_GROUPS,
        "scores_plot": _scores_plot(result),
        "differences_plot": _differences_plot(result),
    }


def _sample(result: Mapping[str, Any], records: Sequence[Record]) -> list[dict[str, Any]]:
    """Return the questions that the first condition answered best and worst in each group.

    The first condition is the state, unless it was left out.
    """
    metric, first = result["metric"], next(iter(result["conditions"]))
    by_item: dict[str, list[Record]] = {}
    for record in records:
        by_item.setdefault(record.item, []).append(record)
    chosen = []
    for group in result["groups"][:SAMPLE_GROUPS]:
        answers = [record for record in records if record.condition == first and record.group == group]
        best, worst = max(answers, key=lambda one: one.scores[metric]), min(answers, key=lambda one: one.scores[metric])
        kinds = {best.item: "highest", worst.item: "lowest"} if best.item != worst.item else {best.item: "all alike"}
        for record in {best.item: best, worst.item: worst}.values():
            chosen.append(
                {
                    "group": group,
                    "item": record.item,
                    "kind": kinds[record.item],
                    "score": record.scores[metric],
                    "question": record.question,
                    "right": record.right,
                    "records": by_item[record.item],
                }
            )
    return chosen


def _scores_plot(result: Mapping[str, Any]) -> dict[str, str]:
    rows = {name: result["scores"][name] for name in result["conditions"]}
    means = "; ".join(f"{readable_name(name)} {result['overall'][name][0]:.2f}" for name in rows)

    def draw(narrow: bool) -> Figure:
        return scores_figure(result["metric"], result["groups"], rows, narrow=narrow)

    return both_widths("scores", draw, "Scores by condition and group", f"Over all questions: {means}.")


def _differences_plot(result: Mapping[str, Any]) -> dict[str, str]:
    differences = {
        name: {**one, "clear": is_clear(one["low"], one["high"], one["p_value"], one["histories"])}
        for name, one in result["differences"].items()
    }
    if not differences:
        return {}

    def draw(narrow: bool) -> Figure:
        return differences_figure(f"state minus the other, {readable_name(result['metric'])}", differences, narrow)

    return both_widths("differences", draw, "Gain from the state", "; ".join(result["verdict"]))


def both_widths(name: str, draw: Callable[[bool], Figure], title: str, description: str) -> dict[str, str]:
    """Draw a figure for wide pages and one for phones; the page shows the one that fits."""
    return {kind: svg(draw(kind == "narrow"), f"{name}-{kind}", title, description) for kind in ("wide", "narrow")}

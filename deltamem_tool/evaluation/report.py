"""A recall result as a table and a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.table import Table

from deltamem_tool.evaluation.recall import RecallResult
from deltamem_tool.files import write_whole

# State and ceiling stand out; the four controls share the bottom of the plot, so their marks differ.
_STYLE: dict[str, dict[str, Any]] = {
    "state_only": {"color": "#0b6e4f", "marker": "o", "linewidth": 2.5},
    "full_context": {"color": "#555555", "marker": "s", "linestyle": "--"},
    "donor_state": {"color": "#c8553d", "marker": "^"},
    "zero_state": {"color": "#d9a404", "marker": "v"},
    "scale_zero": {"color": "#7b6db5", "marker": "x"},
    "no_memory": {"color": "#3d85c6", "marker": "+"},
}


def recall_table(result: RecallResult) -> Table:
    table = Table(title=f"Recall: exact match, {result.episodes} conversations each, 95 % interval")
    table.add_column("facts told", style="bold")
    for count in result.facts:
        table.add_column(str(count), justify="right")
    for condition, scores in result.scores.items():
        cells = [f"{score.mean:.2f}\n[dim]{score.low:.2f}–{score.high:.2f}[/dim]" for score in scores]
        table.add_row(condition.replace("_", " "), *cells)
    return table


def plot_recall(result: RecallResult, path: Path) -> None:
    """Draw exact match by number of facts as a PNG."""
    figure = _figure()
    axes = figure.subplots()
    for condition, style in _STYLE.items():
        if condition not in result.scores:
            continue
        scores = result.scores[condition]
        axes.plot(result.facts, [score.mean for score in scores], label=condition.replace("_", " "), **style)
        axes.fill_between(
            result.facts,
            [score.low for score in scores],
            [score.high for score in scores],
            color=style["color"],
            alpha=0.15,
            linewidth=0,
        )
    axes.set(xlabel="facts told", ylabel="exact match of the first answer", ylim=(-0.03, 1.03), xticks=result.facts)
    axes.set_title("What is recalled after the conversation has left the context", fontsize=11)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))  # beside the curves, not on them
    _save(figure, path)


def plot_losses(losses: Sequence[tuple[int, float]], path: Path) -> None:
    """Draw (step, loss) pairs as a PNG."""
    figure = _figure()
    axes = figure.subplots()
    axes.plot([step for step, _ in losses], [loss for _, loss in losses], color="#0b6e4f")
    axes.set(xlabel="step", ylabel="cross-entropy of the answers", ylim=(0, None))
    axes.set_title("Training: answers from the memory alone", fontsize=11)
    axes.grid(alpha=0.3)
    _save(figure, path)


def _figure() -> Figure:
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=140)
    write_whole(path, buffer.getvalue())

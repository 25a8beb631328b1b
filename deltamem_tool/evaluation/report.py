"""An evaluation as a table and a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.table import Table

from deltamem_tool.evaluation.conditions import STATE, in_words
from deltamem_tool.evaluation.runner import Evaluation
from deltamem_tool.files import write_whole

# State and ceiling stand out; the controls share the bottom of the plot, so their marks differ.
_STYLE: dict[str, dict[str, Any]] = {
    STATE: {"color": "#0b6e4f", "marker": "o", "linewidth": 2.5},
    "full_context": {"color": "#555555", "marker": "s", "linestyle": "--"},
    "donor_state": {"color": "#c8553d", "marker": "^"},
    "zero_state": {"color": "#d9a404", "marker": "v"},
    "scale_zero": {"color": "#7b6db5", "marker": "x"},
    "no_adapter": {"color": "#3d85c6", "marker": "+"},
    "bm25": {"color": "#8c6d46", "marker": "D", "linestyle": ":"},
}


def score_table(found: Evaluation) -> Table:
    """The first metric, a row a condition and a column a group."""
    metric = found.metrics[0]
    counts = {group: len(found.scores(metric, found.conditions[0].name, group)[0]) for group in found.groups}
    table = Table(title=f"{found.task}, protocol {found.protocol}: {in_words(metric)}, 95 % interval")
    table.add_column("", style="bold")
    for group in found.groups:
        table.add_column(f"{group}\n[dim]{counts[group]}[/dim]", justify="right")
    for condition in found.conditions:
        estimates = [found.estimate(metric, condition.name, group) for group in found.groups]
        cells = [f"{one.mean:.2f}\n[dim]{one.low:.2f}–{one.high:.2f}[/dim]" for one in estimates]
        table.add_row(in_words(condition.name), *cells)
    return table


def plot_scores(found: Evaluation, path: Path) -> None:
    """Draw the first metric by group as a PNG."""
    figure = _figure()
    axes = figure.subplots()
    metric, places = found.metrics[0], range(len(found.groups))
    for condition in found.conditions:
        style = _STYLE[condition.name]
        estimates = [found.estimate(metric, condition.name, group) for group in found.groups]
        axes.plot(places, [one.mean for one in estimates], label=in_words(condition.name), **style)
        lows, highs = [one.low for one in estimates], [one.high for one in estimates]
        axes.fill_between(places, lows, highs, color=style["color"], alpha=0.15, linewidth=0)
    axes.set(ylabel=in_words(metric), ylim=(-0.03, 1.03))
    axes.set_xticks(places, found.groups)
    axes.set_title(f"{found.task}, protocol {found.protocol}", fontsize=11)
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

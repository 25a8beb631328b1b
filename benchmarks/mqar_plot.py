"""Plot the results of `mqar.py`: recall against pairs for every rank, number of states and update rule."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from capacity_plot import new_figure, save
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator


def draw(cells: Sequence[Any], rules: Sequence[Any], path: Path) -> None:
    """Draw a panel per rank, and three for the rules: during training, by position, and against pairs."""
    shapes = sorted({(cell["rank"], cell["states"]) for cell in cells})
    ranks = sorted({rank for rank, _ in shapes})
    counts = sorted({states for _, states in shapes})
    columns = max(len(ranks), 3)
    figure = new_figure(2, columns)
    above, below = figure.subplots(2, columns, squeeze=False)
    for rank, axes in zip(ranks, above, strict=False):
        for states in (states for other, states in shapes if other == rank):
            mine = [cell for cell in cells if (cell["rank"], cell["states"]) == (rank, states)]
            colour = colormaps["viridis"](counts.index(states) / len(counts))
            _recalls(axes, mine, colour, f"{states} state{'s' * (states > 1)}")
            if rank * states <= mine[0]["pairs"][-1]:
                axes.axvline(rank * states, color=colour, linestyle="--", linewidth=0.8)
        _finish(axes, f"rank {rank}, {cells[0]['steps']} steps", "pairs", log=True)
    for number, cell in enumerate(rules):
        rule, colour = cell["rule"], colormaps["tab10"](number)
        below[0].plot(*zip(*cell["curve"], strict=True), color=colour, label=rule)
        positions = cell["trained, by position"]
        below[1].plot(range(1, len(positions) + 1), positions, color=colour, marker=".", label=rule)
        _recalls(below[2], [cell], colour, rule)
    shape = f"{rules[0]['states']} states of {rules[0]['rank']}×{rules[0]['rank']}"
    _finish(below[0], f"rules, {shape}: 16 pairs in training", "step")
    _finish(
        below[1], f"16 pairs by position, {rules[0]['steps']} steps", "place in the sequence (16 is the last written)"
    )
    _finish(below[2], f"rules, {rules[0]['steps']} steps", "pairs", log=True)
    for axes in [*above[len(ranks) :], *below[3:]]:
        axes.set_axis_off()
    title = "Trained (solid; the band is least to most of the seeds), the rule alone with random keys (dotted), and "
    figure.suptitle(title + "rank × states, the most keys that can be orthogonal (dashed)", fontsize=12)
    save(figure, path)


def _recalls(axes: Axes, cells: Sequence[Any], colour: Any, label: str) -> None:
    pairs = cells[0]["pairs"]
    axes.plot(pairs, _mean(cells, "trained"), color=colour, marker="o", markersize=4, label=label)
    spans = [[mean for mean, _ in cell["trained"]] for cell in cells]
    lows, highs = ([extreme(values) for values in zip(*spans, strict=True)] for extreme in (min, max))
    axes.fill_between(pairs, lows, highs, color=colour, alpha=0.2, linewidth=0)
    axes.plot(pairs, _mean(cells, "predicted"), color=colour, linestyle=":", linewidth=1.2)


def _mean(cells: Sequence[Any], name: str) -> list[float]:
    return [sum(recalls) / len(cells) for recalls in zip(*([r[0] for r in cell[name]] for cell in cells), strict=True)]


def _finish(axes: Axes, title: str, xlabel: str, log: bool = False) -> None:
    axes.set_title(title, fontsize=10)
    axes.set(xlabel=xlabel, ylabel="recall", ylim=(-0.03, 1.05))
    if log:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="best")

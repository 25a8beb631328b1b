"""The figure of `mqar.py`: recall against pairs at every rank and number of states, and of every update rule."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from capacity_plot import new_figure, save
from matplotlib import colormaps
from matplotlib.axes import Axes


def draw(cells: Sequence[Any], path: Path) -> None:
    """A panel a rank, and three of the rules: along training, along the sequence, and against pairs."""
    shapes = sorted({(cell["rank"], cell["states"]) for cell in cells if cell["rule"] == "no_lambda"})
    ranks = sorted({rank for rank, _ in shapes})
    figure = new_figure(2, max(len(ranks), 3))
    grid = figure.subplots(2, max(len(ranks), 3), squeeze=False)
    counts = sorted({states for _, states in shapes})
    colours = {states: colormaps["viridis"](n / len(counts)) for n, states in enumerate(counts)}
    for rank, axes in zip(ranks, grid[0], strict=False):
        for states in (states for other, states in shapes if other == rank):
            mine = [c for c in cells if (c["rank"], c["states"], c["rule"]) == (rank, states, "no_lambda")]
            _recalls(axes, mine, colours[states], f"{states} state{'s' * (states > 1)}")
            axes.plot(mine[0]["pairs"], _mean(mine, "predicted"), color=colours[states], linestyle=":", linewidth=1.2)
            if rank * states <= mine[0]["pairs"][-1]:
                axes.axvline(rank * states, color=colours[states], linestyle="--", linewidth=0.8)
        _finish(axes, f"rank {rank}", "pairs", log=True)
    watched = [cell for cell in cells if cell["curve"]]
    rules = list(dict.fromkeys(cell["rule"] for cell in watched))
    for number, rule in enumerate(rules):
        mine = [cell for cell in watched if cell["rule"] == rule]
        colour = colormaps["tab10"](number)
        curves = [[recall for _, recall in cell["curve"]] for cell in mine]
        grid[1][0].plot([step for step, _ in mine[0]["curve"]], _means(curves), color=colour, label=rule)
        positions = _means([cell["trained, by position"] for cell in mine])
        grid[1][1].plot(range(1, len(positions) + 1), positions, color=colour, marker=".", label=rule)
        _recalls(grid[1][2], mine, colour, rule)
        grid[1][2].plot(mine[0]["pairs"], _mean(mine, "predicted"), color=colour, linestyle=":", linewidth=1.2)
    if watched:
        shape = f"{watched[0]['states']} states of {watched[0]['rank']}×{watched[0]['rank']}"
        _finish(grid[1][0], f"rules, {shape}: 16 pairs", "training step")
        _finish(grid[1][1], "16 pairs, by position, when trained", "place in the sequence (16 is the last written)")
        _finish(grid[1][2], "rules", "pairs", log=True)
    for axes in [*grid[0][len(ranks) :], *grid[1][3 if watched else 0 :]]:
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


def _mean(cells: Sequence[Any], name: str) -> list[float]:
    return _means([[recall for recall, _ in cell[name]] for cell in cells])


def _means(rows: Sequence[Sequence[float]]) -> list[float]:
    return [sum(column) / len(column) for column in zip(*rows, strict=True)]


def _finish(axes: Axes, title: str, xlabel: str, log: bool = False) -> None:
    axes.set_title(title, fontsize=10)
    axes.set(xlabel=xlabel, ylabel="recall", ylim=(-0.03, 1.05))
    if log:
        axes.set_xscale("log", base=2)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="best")

"""Plot the curves of `capacity.py`: each adapter with its predictions, and all adapters together."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from deltamem_tool.io.atomic import write_atomically

MEASURED, OLD, LEFT = "#0b6e4f", "#c8553d", "#3d85c6"
CONTROLS = {"donor_state": ("another's state", "#7b6db5", "^"), "zero_state": ("state zeroed", "#d9a404", "v")}
KEYS = {
    "own": ("nearest value of what is read", "--"),
    "random": ("the same with random keys", ":"),
    "rotated": ("the same with rotated keys", "-."),
}


def draw_adapter(points: Sequence[Any], curves: Sequence[Any], path: Path) -> None:
    """Draw a panel per curve, measured and predicted, and below it the share of a fact's reading that is left."""
    figure = new_figure(3, 3)
    grid = figure.subplots(3, 3)
    for curve, axes in zip(curves, grid.flat, strict=False):
        mine = _of(points, curve)
        at = _places(mine, curve)
        _measured(axes, mine, at, "exact", MEASURED, "measured")
        for keys, (label, style) in KEYS.items():
            axes.plot(at, _predicted(mine, f"exact, {keys} keys"), color=MEASURED, linestyle=style, label=label)
        if "old, state" in mine[0]["measured"]:
            _measured(axes, mine, at, "old", OLD, "the old value, measured")
            for keys, (label, style) in KEYS.items():
                axes.plot(at, _predicted(mine, f"old, {keys} keys"), color=OLD, linestyle=style, label=f"old: {label}")
        for control, (label, colour, marker) in CONTROLS.items():
            means = [point["measured"][f"exact, {control}"][0] for point in mine]
            axes.plot(at, means, color=colour, marker=marker, markersize=4, linewidth=1, label=label)
        _finish(axes, curve, "exact match")
    since = [curve for curve in curves if curve.along == "delay"]
    for curve, axes in zip([curves[0], *since[:2]], grid[2], strict=True):
        mine = _of(points, curve)
        at = _places(mine, curve)
        axes.plot(at, _predicted(mine, "left, own keys"), color=LEFT, marker="o", label="own keys")
        expected = _predicted(mine, "left, random keys")
        axes.plot(at, expected, color=LEFT, linestyle=":", marker=".", label="random keys, Π (keep − erase / R)")
        rotated = _predicted(mine, "left, rotated keys")
        axes.plot(at, rotated, color=LEFT, linestyle="-.", marker=".", label="rotated keys")
        _finish(axes, curve, "share of the reading left")
        axes.legend(fontsize=8, loc="best")
    handles, labels = grid[1][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9)
    config = points[0]["config"]
    size = f"{config['state_heads']} × {config['rank']}×{config['rank']} per layer, {config['update_rule']}"
    figure.suptitle(f"{points[0]['name']}: {size}; {points[0]['episodes']} conversations per point", fontsize=12)
    save(figure, path)


def draw_comparison(points: Sequence[Any], curves: Sequence[Any], path: Path) -> None:
    """Draw a panel per curve with a colour per adapter: measured, and predicted with random keys."""
    figure = new_figure(2, 3)
    grid = figure.subplots(2, 3)
    names = list(dict.fromkeys(point["name"] for point in points))
    colours = [colormaps["tab10"](number % 10) for number in range(len(names))]
    for curve, axes in zip(curves, grid.flat, strict=True):
        for name, colour in zip(names, colours, strict=True):
            mine = _of([point for point in points if point["name"] == name], curve)
            at = _places(mine, curve)
            _measured(axes, mine, at, "exact", colour, name)
            axes.plot(at, _predicted(mine, "exact, random keys"), color=colour, linestyle=":", linewidth=1.2)
        _finish(axes, curve, "exact match")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(names), 8), fontsize=9)
    figure.suptitle("Measured (solid), and predicted by the delta rule with random keys (dotted)", fontsize=12)
    save(figure, path)


def _of(points: Sequence[Any], curve: Any) -> list[Any]:
    return sorted((point for point in points if point["curve"] == curve.name), key=lambda point: point["value"])


def _places(points: Sequence[Any], curve: Any) -> list[float]:
    """Return the positions of the points on the axis: numbers of facts, or of tokens written since."""
    return [p["value"] if curve.along == "facts" else p["predicted"]["tokens since"] for p in points]


def _predicted(points: Sequence[Any], name: str) -> list[float]:
    return [point["predicted"][name] for point in points]


def _measured(axes: Axes, points: Sequence[Any], at: Sequence[float], metric: str, colour: Any, label: str) -> None:
    means, lows, highs = zip(*(point["measured"][f"{metric}, state"] for point in points), strict=True)
    axes.plot(at, means, color=colour, marker="o", linewidth=2, label=label)
    axes.fill_between(at, lows, highs, color=colour, alpha=0.15, linewidth=0)


def _finish(axes: Axes, curve: Any, of_what: str) -> None:
    axes.set_title(curve.title, fontsize=10)
    axes.set(xlabel="facts" if curve.along == "facts" else "tokens written since", ylabel=of_what, ylim=(-0.03, 1.05))
    axes.grid(alpha=0.3)


def new_figure(rows: int, columns: int) -> Figure:
    figure = Figure(figsize=(4.2 * columns, 3.2 * rows + 0.8), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_atomically(path, buffer.getvalue())

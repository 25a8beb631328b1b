"""Plot scores and differences, for a file or as SVG for a page."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from textwrap import fill
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from deltamem_tool.evaluation.conditions import STATE, readable_name
from deltamem_tool.evaluation.scoring.statistics import Interval
from deltamem_tool.io.pictures import printable

INK, GRID, PAPER = "#222222", "#cccccc", "#ffffff"
# The state and the full context stand out. The controls lie together at the bottom of the plot: their markers differ.
_STYLE: dict[str, dict[str, Any]] = {
    STATE: {"color": "#0b6e4f", "marker": "o", "linewidth": 2.5},
    "full_context": {"color": "#555555", "marker": "s", "linestyle": "--"},
    "donor_state": {"color": "#c8553d", "marker": "^"},
    "zero_state": {"color": "#d9a404", "marker": "v"},
    "mean_state": {"color": "#a63d97", "marker": "<"},
    "permuted_state": {"color": "#1f7a8c", "marker": ">"},
    "scale_zero": {"color": "#7b6db5", "marker": "x"},
    "no_adapter": {"color": "#3d85c6", "marker": "+"},
    "static": {"color": "#6f4e37", "marker": "p"},
    "bm25": {"color": "#8c6d46", "marker": "D", "linestyle": ":"},
}
# Used in turn for conditions that are not named above.
_OTHERS: tuple[dict[str, Any], ...] = (
    {"color": "#b0307c", "marker": "P"},
    {"color": "#2a8c9e", "marker": "*"},
    {"color": "#6b8e23", "marker": "<"},
    {"color": "#9c5a2b", "marker": ">"},
    {"color": "#5a5fcf", "marker": "h"},
)
# Colours on a dark page, by the colour on a light page: the same hue, lighter.
DARK = {
    "#0b6e4f": "#3fd09b",
    "#555555": "#b4bac2",
    "#c8553d": "#f08a72",
    "#d9a404": "#f0c440",
    "#a63d97": "#df8ad3",
    "#1f7a8c": "#5fc0d3",
    "#7b6db5": "#b0a3ea",
    "#3d85c6": "#78b7f0",
    "#6f4e37": "#c39b80",
    "#8c6d46": "#cba878",
    "#b0307c": "#ef86c2",
    "#2a8c9e": "#62cadc",
    "#6b8e23": "#a9cf55",
    "#9c5a2b": "#de9a66",
    "#5a5fcf": "#989df5",
}
_ROW_INCHES = 0.17  # height of one condition in a group, if groups are listed
_NARROW = 26  # characters per line of a name


def styles(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the plot style of each condition. A condition with its own style looks the same in every plot."""
    strangers = [name for name in names if name not in _STYLE]
    return {name: _STYLE.get(name) or _OTHERS[strangers.index(name) % len(_OTHERS)] for name in names}


def scores_figure(
    metric: str, groups: Sequence[str], rows: Mapping[str, Sequence[Interval]], title: str = "", narrow: bool = False
) -> Figure:
    """Plot the mean of each condition by group, with its interval.

    Groups whose names begin with increasing numbers, such as "4 facts", form an axis. Other groups are listed, because
    a line between them would have no meaning.

    Args:
        metric: name of the metric.
        groups: names of the groups.
        rows: one interval per group, by condition.
        title: title above the figure.
        narrow: whether the figure is for a phone.
    """
    with _plot_style():
        if _is_ascending(groups):
            figure = _figure(4.9 if narrow else 8, 4.6 if narrow else 4.2)
            axes = figure.subplots()
            _curves(axes, metric, groups, rows)
        else:
            height = 1.2 + _ROW_INCHES * len(groups) * (len(rows) + 1) + (0.25 * len(rows) if narrow else 0)
            figure = _figure(4.9 if narrow else 8, max(height, 2.6))
            axes = figure.subplots()
            _dots(axes, metric, groups, rows)
        axes.set_title(printable(title), fontsize=11)
        axes.grid(alpha=0.6, linewidth=0.6)
        place: Any = "outside lower center" if narrow else "outside right center"  # beside the curves
        figure.legend(loc=place, fontsize=9, ncols=2 if narrow else 1, frameon=False)
    return figure


def differences_figure(label: str, differences: Mapping[str, Mapping[str, float]], narrow: bool = False) -> Figure:
    """Plot the difference of each condition with its interval; a hollow mark is not distinguishable from 0.

    Args:
        label: label of the axis.
        differences: `mean`, `low`, `high` and `clear`, by condition.
        narrow: whether the figure is for a phone.
    """
    with _plot_style():
        figure = _figure(4.9 if narrow else 8, 1.0 + 0.34 * len(differences))
        axes = figure.subplots()
        for place, (name, style) in enumerate(styles(list(differences)).items()):
            one, colour = differences[name], style["color"]
            inside = colour if one["clear"] else PAPER
            axes.hlines(place, one["low"], one["high"], color=colour, linewidth=1.5)
            axes.plot(one["mean"], place, marker="o", color=colour, markerfacecolor=inside, zorder=3)
        axes.axvline(0, color=INK, linewidth=1)
        axes.set_yticks(range(len(differences)), [_label(name) for name in differences])
        axes.set_ylim(len(differences) - 0.5, -0.5)
        axes.set_xlabel(label)
        axes.grid(axis="x", alpha=0.6, linewidth=0.6)
    return figure


def losses_figure(losses: Sequence[tuple[int, float]]) -> Figure:
    """Plot (step, loss) pairs as a curve."""
    with _plot_style():
        figure = _figure(7, 4.2)
        axes = figure.subplots()
        axes.plot([step for step, _ in losses], [loss for _, loss in losses], color=_STYLE[STATE]["color"])
        axes.set(xlabel="step", ylabel="cross-entropy of the answers", ylim=(0, None))
        axes.set_title("Training: answers from the memory alone", fontsize=11)
        axes.grid(alpha=0.6, linewidth=0.6)
    return figure


def svg(figure: Figure, name: str, title: str, description: str) -> str:
    """Convert a figure to SVG to embed in a page. It uses the page's colours, and its text stays text.

    Args:
        figure: the figure.
        name: prefix of all ids, which must be unique in a page.
        title: read out by screen readers instead of the picture.
        description: read out after the title.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the browser has other fonts
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r' id="', f' id="{name}-', text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)  # the page decides the width
    text = text.replace(INK, "currentColor").replace(GRID, "var(--line)").replace(PAPER, "var(--paper)")
    for colour in DARK:
        text = text.replace(colour, f"var(--plot-{colour[1:]})")
    description_tags = (
        f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-desc">{escape(description)}</desc>'
    )
    opening = f'<svg role="img" aria-labelledby="{name}-title {name}-desc"'
    return re.sub(r"<svg([^>]*)>", lambda match: f"{opening}{match[1]}>{description_tags}", text, count=1)


@contextmanager
def _plot_style() -> Iterator[None]:
    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    look: dict[Any, Any] = {name: INK for name in inked}
    look |= {"grid.color": GRID, "axes.spines.top": False, "axes.spines.right": False}
    look["text.parse_math"] = False  # a $ in a group's name is not math
    with matplotlib.rc_context(look):
        yield


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _is_ascending(groups: Sequence[str]) -> bool:
    """Return whether the names begin with increasing numbers."""
    matches = [re.match(r"\d+", group) for group in groups]
    numbers = [int(one[0]) for one in matches if one]
    return len(numbers) == len(groups) > 1 and numbers == sorted(set(numbers))


def _curves(axes: Axes, metric: str, groups: Sequence[str], rows: Mapping[str, Sequence[Interval]]) -> None:
    places = range(len(groups))
    for name, style in styles(list(rows)).items():
        means, lows, highs = zip(*rows[name], strict=True)
        axes.plot(places, means, label=_label(name), **style)
        axes.fill_between(places, lows, highs, color=style["color"], alpha=0.15, linewidth=0)
    axes.set_ylabel(readable_name(metric))
    axes.set_xticks(places, [_label(group, 12) for group in groups])
    if _are_shares(rows):
        axes.set_ylim(-0.03, 1.03)


def _dots(axes: Axes, metric: str, groups: Sequence[str], rows: Mapping[str, Sequence[Interval]]) -> None:
    """Plot the conditions below each other within their group."""
    for at, (name, style) in enumerate(styles(list(rows)).items()):
        means, lows, highs = zip(*rows[name], strict=True)
        places = [group + (at + 1) / (len(rows) + 1) for group in range(len(groups))]
        axes.hlines(places, lows, highs, color=style["color"], linewidth=1.5)
        axes.plot(means, places, linestyle="none", marker=style["marker"], color=style["color"], label=_label(name))
    axes.set_xlabel(readable_name(metric))
    axes.set_yticks([group + 0.5 for group in range(len(groups))], [_label(group, _NARROW) for group in groups])
    axes.set_ylim(len(groups), 0)
    axes.tick_params(axis="y", length=0)
    for group in range(1, len(groups)):
        axes.axhline(group, color=GRID, linewidth=0.8)
    if _are_shares(rows):
        axes.set_xlim(-0.03, 1.03)


def _label(name: str, width: int = _NARROW) -> str:
    """Wrap a name. Text that no font has, such as half of a surrogate pair, becomes question marks."""
    return fill(printable(readable_name(name)), width)


def _are_shares(rows: Mapping[str, Sequence[Interval]]) -> bool:
    """Return whether all values lie between 0 and 1, like shares of correct answers and unlike log-probabilities."""
    return all(0 <= figure <= 1 for row in rows.values() for one in row for figure in one)

"""Show a memory in a terminal: a bar for the norm of each layer, and states as small heat maps. Imports no torch.

A heat map is drawn with the upper half block character: its foreground colour is one entry and its background colour
the entry below, so that an entry is about square. In a terminal without colours, entries are printed as numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from rich.bar import Bar
from rich.columns import Columns
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

_NEGATIVE, _ZERO, _POSITIVE = (np.array(colour) for colour in ((33, 102, 172), (247, 247, 247), (178, 24, 43)))
_UPPER_HALF = "▀"
_TENTHS = 9  # without colours the largest entry is 9

States = Mapping[int, np.ndarray]


def strongest_layer(states: States) -> int:
    """Return the layer whose state `[H, R, R]` has the largest norm; the first one if several are equal."""
    return max(states, key=lambda layer: norm(states[layer]))


def norm(state: np.ndarray) -> float:
    """Return the Frobenius norm of all states `[H, R, R]` of a layer, in float64: squares of large float32 overflow."""
    return float(np.linalg.norm(state.astype(np.float64)))


def norm_bars(states: States) -> Table:
    """Return one bar per layer, as long as its norm. The longest is as wide as the terminal allows.

    Args:
        states: `[H, R, R]` by layer.
    """
    norms = {layer: norm(states[layer]) for layer in sorted(states)}
    longest = max(norms.values()) or 1.0
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(ratio=1, max_width=40)
    for layer, value in norms.items():
        table.add_row(f"layer {layer}", f"{value:.3g}", Bar(longest, 0, value, color="cyan"))
    return table


def heat_maps(layer: int, state: np.ndarray) -> RenderableType:
    """Return one layer's states `[H, R, R]` side by side on one colour scale, symmetric around 0, with a legend."""
    limit = float(np.abs(state).max()) or 1.0
    maps = [Group(Text(f"head {head}"), HeatMap(entries, limit)) for head, entries in enumerate(state)]
    return Group(Text(f"layer {layer}"), Columns(maps, padding=(0, 2)), _Legend(limit))


class HeatMap:
    """One state, to be drawn by rich.

    Args:
        entries: `[R, R]`; rows are values and columns are keys.
        limit: absolute value that is drawn in full colour, above 0.
    """

    def __init__(self, entries: np.ndarray, limit: float) -> None:
        self._entries, self._limit = entries, limit

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from self._coloured_lines() if _has_colours(console) else self._number_lines()

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        width = self._entries.shape[1] * (1 if _has_colours(console) else 3)
        return Measurement(width, width)

    def _coloured_lines(self) -> Iterator[Text]:
        for row in range(0, len(self._entries), 2):
            line = Text(no_wrap=True)
            lower = self._entries[row + 1] if row + 1 < len(self._entries) else [None] * self._entries.shape[1]
            for above, below in zip(self._entries[row], lower, strict=True):
                behind = "" if below is None else f" on {_colour(below / self._limit)}"
                line.append(_UPPER_HALF, f"{_colour(above / self._limit)}{behind}")
            yield line

    def _number_lines(self) -> Iterator[Text]:
        for row in self._entries:
            yield Text("".join(f"{round(_TENTHS * entry / self._limit):3d}" for entry in row), no_wrap=True)


class _Legend:
    """Return the legend of the colours or numbers."""

    def __init__(self, limit: float) -> None:
        self._limit = limit

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        low, high = f"−{self._limit:.2g}", f"{self._limit:.2g}"
        if _has_colours(console):
            scale = Text.assemble(*((f"{_UPPER_HALF}", f"{_colour(x)} on {_colour(x)}") for x in np.linspace(-1, 1, 9)))
            said = Text.assemble(f"{low} ", scale, f" {high}; ")
        else:
            said = Text(f"−{_TENTHS} is {low}, {_TENTHS} is {high}; ")
        yield said.append("rows are values, columns are keys")


def _has_colours(console: Console) -> bool:
    return console.color_system is not None and not console.no_color and not console.options.ascii_only


def _colour(share: float) -> str:
    """Blue at -1, white at 0, red at 1."""
    end = _POSITIVE if share > 0 else _NEGATIVE
    red, green, blue = np.rint(_ZERO + min(1.0, abs(float(share))) * (end - _ZERO)).astype(int)
    return f"rgb({red},{green},{blue})"

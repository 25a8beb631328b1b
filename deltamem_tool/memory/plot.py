"""Plot a memory: every state of one conversation as a small heat map. Imports no torch.

All panels of one kind share a colour scale that is symmetric around 0, so that you can compare them by eye.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from deltamem_tool.io.pictures import printable, write_picture

MOST_PANELS = 192  # with more, a difference is drawn without the two memories that it is between
_DPI = 140
_COLOURS = "RdBu_r"  # white in the middle
_GREY = "#555555"
_LEGEND = "each panel is one state: rows are values, columns are keys"
_LEGEND_HEADS = "each panel is one state, the heads of a layer side by side: rows are values, columns are keys"
_ASPECT = 1.7  # width by height that the panels are laid out for
_LEAST_WIDTH, _LABEL = 4.4, 0.14  # inches: of a picture; of a line of text

States = Mapping[int, np.ndarray]


def plot_memory(states: States, path: str | Path, title: str) -> None:
    """Plot the states of one conversation, `[H, R, R]` by layer, to a file that is written whole or not at all.

    The extension of the file sets the format: PNG, SVG, PDF, JPEG, …

    Raises:
        ConfigError: `path` does not have the extension of a supported format.
    """
    write_picture(memory_figure(states, title), path, _DPI)


def plot_difference(before: States, after: States, path: str | Path, title: str) -> None:
    """Plot the changes between two states of one conversation, each `[H, R, R]` by layer.

    The extension of the file sets the format: PNG, SVG, PDF, JPEG, …

    Raises:
        ConfigError: `path` does not have the extension of a supported format.
    """
    write_picture(difference_figure(before, after, title), path, _DPI)


def memory_figure(states: States, title: str) -> Figure:
    """Return a figure with one panel per layer and head, in the order of the layers."""
    return _figure([_Block("", states, _limit(states))], title)


def difference_figure(before: States, after: States, title: str) -> Figure:
    """Draw before, after and their difference side by side; with more than `MOST_PANELS` panels, only the difference.

    The two memories share a colour scale, and the difference, which is often much smaller, has its own.
    """
    # In float64: the difference of two large float32 numbers may be none.
    changed = {layer: np.subtract(after[layer], before[layer], dtype=np.float64) for layer in before}
    difference = _Block("after − before", changed, _limit(changed))
    if 3 * sum(len(state) for state in changed.values()) > MOST_PANELS:
        return _figure([difference], title)
    limit = max(_limit(before), _limit(after))
    return _figure([_Block("before", before, limit, bar=False), _Block("after", after, limit), difference], title)


@dataclass(frozen=True)
class _Block:
    """States that are drawn together, on a colour scale from -limit to limit."""

    name: str
    states: States
    limit: float
    bar: bool = True  # whether the scale is drawn beside it


@dataclass(frozen=True)
class _Grid:
    """Layout of the panels of a block. One unit is one entry of a state, so panels are squares of side `rank`."""

    layers: int
    heads: int
    rank: int
    columns: int  # layers side by side
    scale: float  # inches of an entry

    @classmethod
    def from_states(cls, states: States, blocks: int) -> _Grid:
        """Choose panels of a good size, in as many columns as make `blocks` side by side about `_ASPECT`."""
        heads, rank = (max(state.shape[axis] for state in states.values()) for axis in (0, 1))
        panels = len(states) * heads
        panel = min(2.0, 10 / (blocks * heads), max(0.46, 3.7 / math.sqrt(blocks * panels)))
        shape = _ASPECT / blocks * (panel + 1.5 * _LABEL) / (heads * panel + _LABEL)
        rows = math.ceil(len(states) / max(1, int(math.sqrt(len(states) * shape))))
        return cls(len(states), heads, rank, math.ceil(len(states) / rows), panel / rank)

    @property
    def label(self) -> float:
        return _LABEL / self.scale

    @property
    def step(self) -> float:
        """Distance between two heads."""
        return self.rank + 0.3 * self.label

    @property
    def width(self) -> float:
        return self.columns * (self.heads * self.step + self.label) - self.label

    @property
    def height(self) -> float:
        return math.ceil(self.layers / self.columns) * (self.rank + 1.5 * self.label) - 0.5 * self.label

    def corner(self, place: int) -> tuple[float, float]:
        """Left and top of the first head of the layer at `place`."""
        row, column = divmod(place, self.columns)
        return column * (self.heads * self.step + self.label), self.label + row * (self.rank + 1.5 * self.label)


def _figure(blocks: Sequence[_Block], title: str) -> Figure:
    """Draw the blocks side by side under `title`."""
    grid = _Grid.from_states(blocks[0].states, len(blocks))
    bars = sum(block.bar for block in blocks)
    width = max(_LEAST_WIDTH, len(blocks) * (grid.width * grid.scale + 0.4) + bars * 0.8)
    figure = Figure(figsize=(width, grid.height * grid.scale + 1.2), dpi=_DPI)
    FigureCanvasAgg(figure)
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.08)
    figure.suptitle(printable(title), fontsize=9, parse_math=False)  # a file's name may have dollar signs
    figure.supxlabel(_LEGEND if grid.heads == 1 else _LEGEND_HEADS, fontsize=7, color=_GREY)
    for axes, block in zip(figure.subplots(1, len(blocks), squeeze=False)[0], blocks, strict=True):
        axes.set_label(block.name or "memory")
        axes.set_title(block.name, fontsize=9, weight="bold")
        _draw(axes, block, grid)
        if block.bar:
            bar = figure.colorbar(axes.images[0], ax=axes, shrink=0.8, aspect=25, pad=0.05)
            bar.ax.set_label(f"{block.name}, colours")
            bar.set_ticks([block.limit * share for share in (-1, -0.5, 0, 0.5, 1)])
            bar.ax.set_yticklabels([f"{tick:.2g}".replace("-", "−") for tick in bar.get_ticks()], fontsize=7)
    return figure


def _draw(axes: Axes, block: _Block, grid: _Grid) -> None:
    for place, layer in enumerate(sorted(block.states)):
        left, top = grid.corner(place)
        axes.text(left, top - 0.2 * grid.label, f"layer {layer}", fontsize=6)
        for head, state in enumerate(block.states[layer]):
            x = left + head * grid.step
            image = axes.imshow(
                state.astype(np.float64),
                cmap=_COLOURS,
                vmin=-block.limit,
                vmax=block.limit,
                interpolation="nearest",
                extent=(x, x + grid.rank, top + grid.rank, top),
            )
            image.set_label(f"layer {layer}, head {head}")
            outline = Rectangle((x, top), grid.rank, grid.rank, fill=False, color="#999999", linewidth=0.5)
            outline.set_clip_on(False)
            axes.add_patch(outline)
    axes.set_axis_off()
    axes.set(xlim=(0, grid.width), ylim=(grid.height, 0), aspect="equal")


def _limit(states: States) -> float:
    """Return the largest absolute value of an entry; 1 if all are 0, because a scale needs some width."""
    return max(float(np.abs(state).max()) for state in states.values()) or 1.0

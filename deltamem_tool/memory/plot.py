"""A memory as a picture: every state of one conversation as a small heat map. No torch.

All panels of one kind share a colour scale that is symmetric around 0, so that their strengths can be compared by eye.
Sizes are in pixels, and a state's entries are squares of whole pixels: no entry looks wider than its neighbour.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from deltamem_tool.io.atomic import write_whole

MOST_PANELS = 192  # with more, a difference is drawn without the two memories that it is between
_DPI = 140
_COLOURS = "RdBu_r"  # white in the middle
_GREY = "#555555"
_LEGEND = "each panel is one state: rows are values, columns are keys"
_ASPECT = 1.4  # width by height that the panels are laid out for
_MARGIN, _HEADER, _FOOTER, _LEAST_WIDTH = 24, 78, 40, 620
_GAP, _GAP_ACROSS, _GAP_DOWN, _LABEL = 5, 18, 10, 22  # between heads; between layers; a line of text
_BAR, _BAR_SPACE, _BAR_HEIGHT, _BETWEEN = 14, 104, 420, 44  # colour bar, with its numbers; between blocks

States = Mapping[int, np.ndarray]


def plot_memory(states: States, path: str | Path, title: str) -> None:
    """Draw the states of one conversation, `[H, R, R]` by layer, as a PNG file, whole or not at all."""
    _save(memory_figure(states, title), path)


def plot_difference(before: States, after: States, path: str | Path, title: str) -> None:
    """Draw what changed between two states of one conversation, each `[H, R, R]` by layer, as a PNG file."""
    _save(difference_figure(before, after, title), path)


def memory_figure(states: States, title: str) -> Figure:
    """One panel a layer and head, in the order of the layers."""
    return _figure([_Block("", states, _limit(states))], title)


def difference_figure(before: States, after: States, title: str) -> Figure:
    """Before, after, and after − before side by side. The two memories share a colour scale and the difference has its
    own: it is often much smaller. With more than `MOST_PANELS` panels, the difference alone."""
    # In float64: the difference of two large float32 numbers may be none.
    changed = {layer: np.subtract(after[layer], before[layer], dtype=np.float64) for layer in before}
    difference = _Block("after − before", changed, _limit(changed))
    if 3 * sum(len(state) for state in changed.values()) > MOST_PANELS:
        return _figure([difference], title)
    limit = max(_limit(before), _limit(after))
    return _figure([_Block("before", before, limit, bar=False), _Block("after", after, limit), difference], title)


@dataclass(frozen=True)
class _Block:
    """States that are drawn together, on a colour scale from -limit to limit, under a name if there is one."""

    name: str
    states: States
    limit: float
    bar: bool = True  # whether the scale is drawn beside it


@dataclass(frozen=True)
class _Layout:
    """Where the panels of a block lie, in pixels from its top left corner: layers from left to right, then down."""

    layers: int
    heads: int
    panel: int
    columns: int  # layers side by side

    @classmethod
    def of(cls, states: States, blocks: int) -> _Layout:
        """Panels of a good size, and as many columns as make `blocks` of them side by side about `_ASPECT`."""
        heads, rank = (max(state.shape[axis] for state in states.values()) for axis in (0, 1))
        size = min(280.0, 1400 / (blocks * heads), max(64.0, 520 / math.sqrt(blocks * len(states) * heads)))
        panel = rank * max(1, round(size / rank))
        every = [cls(len(states), heads, panel, columns) for columns in range(1, len(states) + 1)]
        return min(every, key=lambda layout: layout._flaw(_ASPECT / blocks))

    def _flaw(self, aspect: float) -> float:
        empty = 1 - self.layers / (self.columns * self.rows)
        return abs(math.log(self.width / self.height / aspect)) + 4 * empty

    @property
    def rows(self) -> int:
        return math.ceil(self.layers / self.columns)

    @property
    def _beside(self) -> int:
        return _LABEL if self.heads > 1 else 0  # the layer's name is beside its heads, or above its one head

    @property
    def _above(self) -> int:
        return 0 if self.heads > 1 else _LABEL

    @property
    def width(self) -> int:
        return self.columns * (self._layer_width + _GAP_ACROSS) - _GAP_ACROSS

    @property
    def height(self) -> int:
        return _LABEL - self._above + self.rows * (self._above + self.panel + _GAP_DOWN) - _GAP_DOWN

    @property
    def _layer_width(self) -> int:
        return self._beside + self.heads * (self.panel + _GAP) - _GAP

    def corner(self, place: int, head: int) -> tuple[int, int]:
        """Left and top of the panel of the layer at `place`."""
        row, column = divmod(place, self.columns)
        left = column * (self._layer_width + _GAP_ACROSS) + self._beside + head * (self.panel + _GAP)
        return left, _LABEL + row * (self._above + self.panel + _GAP_DOWN)


def _figure(blocks: Sequence[_Block], title: str) -> Figure:
    """The blocks side by side under `title`, whose first line is large."""
    layout = _Layout.of(blocks[0].states, len(blocks))
    named = _LABEL + 6 if blocks[0].name else 0
    widths = [layout.width + (_BAR_SPACE if block.bar else 0) for block in blocks]
    content = sum(widths) + _BETWEEN * (len(blocks) - 1)
    page = _page(max(_LEAST_WIDTH, content + 2 * _MARGIN), _HEADER + named + layout.height + _FOOTER)
    middle, bottom = page.get_xlim()[1] / 2, page.get_ylim()[0]
    first, _, rest = title.partition("\n")
    # A file's name may have dollar signs, which would be read as mathematics.
    style: dict[str, Any] = {"ha": "center", "va": "top", "parse_math": False}
    page.text(middle, 16, first, fontsize=11, **style)
    page.text(middle, 44, rest, fontsize=8, color=_GREY, **style)
    page.text(middle, bottom - _FOOTER + 14, _LEGEND, fontsize=7, color=_GREY, **style)
    left, top = (page.get_xlim()[1] - content) // 2, _HEADER + named
    for block, width in zip(blocks, widths, strict=True):
        if named:
            page.text(left + layout.width / 2, _HEADER, block.name, fontsize=9, weight="bold", **style)
        _draw(_part(page, left, top, layout.width, layout.height, block.name), block, layout)
        if block.bar:
            height = min(layout.height - _LABEL, _BAR_HEIGHT)
            down = top + _LABEL + (layout.height - _LABEL - height) // 2
            _draw_bar(_part(page, left + layout.width + 20, down, _BAR, height, f"{block.name}, colours"), block)
        left += width + _BETWEEN
    figure = page.figure
    assert isinstance(figure, Figure)
    return figure


def _page(width: float, height: float) -> Axes:
    """Axes over all of a new figure, in pixels from the top left corner."""
    figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI)
    FigureCanvasAgg(figure)
    page = figure.add_axes((0, 0, 1, 1), label="page")
    page.set(xlim=(0, width), ylim=(height, 0))
    page.set_axis_off()
    return page


def _part(page: Axes, left: float, top: float, width: float, height: float, label: str) -> Axes:
    """Axes over a part of the page."""
    across, down = page.get_xlim()[1], page.get_ylim()[0]
    box = (left / across, 1 - (top + height) / down, width / across, height / down)
    return page.figure.add_axes(box, label=label)


def _draw(axes: Axes, block: _Block, layout: _Layout) -> None:
    """The panels of one block, as images in axes that count pixels."""
    axes.set_axis_off()
    axes.set(autoscale_on=False, xlim=(0, layout.width), ylim=(layout.height, 0))
    size = layout.panel
    for place, layer in enumerate(sorted(block.states)):
        for head, state in enumerate(block.states[layer]):
            x, y = layout.corner(place, head)
            image = axes.imshow(
                state.astype(np.float64),
                cmap=_COLOURS,
                vmin=-block.limit,
                vmax=block.limit,
                interpolation="nearest",
                aspect="auto",
                extent=(x, x + size, y + size, y),
            )
            image.set_label(f"layer {layer}, head {head}")
            axes.add_patch(Rectangle((x, y), size, size, fill=False, color="#999999", linewidth=0.5, clip_on=False))
            if layout.heads == 1:
                axes.text(x + size / 2, y - 4, f"layer {layer}", fontsize=7, ha="center", va="baseline")
                continue
            if head == 0:
                axes.text(x - 5, y + size / 2, f"layer {layer}", fontsize=7, ha="right", va="center", rotation=90)
            if place < layout.columns:
                axes.text(x + size / 2, y - 4, f"head {head}", fontsize=7, ha="center", va="baseline")


def _draw_bar(axes: Axes, block: _Block) -> None:
    """The colours of a block; the numbers at its ends are the largest entry by size."""
    ticks = [block.limit * share for share in (-1, -0.5, 0, 0.5, 1)]
    scale = ScalarMappable(Normalize(-block.limit, block.limit), _COLOURS)
    bar = axes.figure.colorbar(scale, cax=axes, ticks=ticks)
    bar.ax.set_yticklabels([f"{tick:.2g}".replace("-", "−") for tick in ticks])
    bar.ax.tick_params(labelsize=7)


def _limit(states: States) -> float:
    """The largest entry by size; 1 where all are 0, since a scale needs some width."""
    return max(float(np.abs(state).max()) for state in states.values()) or 1.0


def _save(figure: Figure, path: str | Path) -> None:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a file's name may be in letters that the font does not have
        figure.savefig(buffer, format="png", dpi=_DPI)
    write_whole(path, buffer.getvalue())

"""The picture of a memory: every state in its panel, on one symmetric colour scale."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from deltamem_tool.memory.plot import MOST_PANELS, difference_figure, memory_figure, plot_difference, plot_memory


def states(layers, heads, rank, seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    return {layer: (rng.normal(size=(heads, rank, rank)) * scale).astype(np.float32) for layer in layers}


def blocks(figure):
    """Axes with panels, from left to right."""
    figure.canvas.draw()  # computes the layout
    panels = [axes for axes in figure.axes if "colours" not in axes.get_label()]
    return sorted(panels, key=lambda axes: axes.get_position().x0)


def words_of(figure):
    texts = [*figure.texts, *(text for axes in figure.axes for text in (*axes.texts, axes.title))]
    return [line for text in texts for line in text.get_text().split("\n")]


def assert_shows(axes, expected):
    """Check for exactly one panel per state of `wanted`, with its numbers, and one symmetric scale for all."""
    panels = {image.get_label(): image for image in axes.images}
    assert len(axes.images) == len(panels) == sum(len(state) for state in expected.values())
    for layer, heads in expected.items():
        for head, state in enumerate(heads):
            panel = panels[f"layer {layer}, head {head}"]
            assert np.array_equal(panel.get_array(), state)
            assert panel.origin == "upper"  # row 0 on top
    limits = {image.get_clim() for image in axes.images}
    assert len(limits) == 1
    low, high = limits.pop()
    assert low == -high < 0
    return high


def assert_tidy(figure, width=2000, height=2000):
    """Check that entries are square and visible, that panels do not overlap, and that nothing leaves the picture."""
    size = figure.get_size_inches() * figure.dpi
    assert (size <= (width, height)).all(), size
    figure.canvas.draw()
    boxes = []
    for axes in blocks(figure):
        for image in axes.images:
            box = image.get_window_extent()
            assert box.width == pytest.approx(box.height, abs=1e-6)
            assert box.width / len(image.get_array()) > 0.9  # pixels of one entry
            boxes.append(box)
    for one, other in combinations(boxes, 2):
        assert min(one.x1, other.x1) <= max(one.x0, other.x0) or min(one.y1, other.y1) <= max(one.y0, other.y0)
    renderer = figure.canvas.get_renderer()
    texts = [text for axes in figure.axes for text in (*axes.texts, *(axes.get_yticklabels() if axes.axison else ()))]
    texts += [*figure.texts, *(axes.title for axes in figure.axes)]
    for box in [*boxes, *(text.get_window_extent(renderer) for text in texts if text.get_text())]:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= size[0] and box.y1 <= size[1]


def place(image):
    left, _, _, top = image.get_extent()
    return top, left


@pytest.mark.parametrize(
    ("layers", "heads", "rank"), [(1, 1, 1), (4, 4, 8), (36, 1, 8), (40, 4, 64), (1, 4, 64), (40, 1, 3), (7, 2, 33)]
)
def test_every_state_has_its_panel(layers, heads, rank):
    layer_states = states(range(layers), heads, rank)
    figure = memory_figure(layer_states, "Memory: mine\nits shape")
    (axes,) = blocks(figure)
    assert assert_shows(axes, layer_states) == max(np.abs(state).max() for state in layer_states.values())
    assert_tidy(figure)
    words = words_of(figure)
    assert {"Memory: mine", "its shape", *(f"layer {layer}" for layer in range(layers))} <= set(words)
    # layers are in reading order, from left to right, then down, and heads within them
    names = [f"layer {layer}, head {head}" for layer in range(layers) for head in range(heads)]
    assert [image.get_label() for image in sorted(axes.images, key=place)] == names


def test_many_layers_are_drawn_in_a_grid():
    width, height = memory_figure(states(range(36), 1, 8), "").get_size_inches()
    assert 0.7 < width / height < 2.5


def test_panels_are_next_to_their_labels():
    """Also if layers are missing, or given in another order."""
    layer_states = states([11, 2, 30], 1, 4)
    (axes,) = blocks(memory_figure(layer_states, ""))
    assert_shows(axes, layer_states)
    names = {text.get_text(): text.get_position() for text in axes.texts}
    for image in axes.images:
        left, right, _bottom, top = image.get_extent()
        x, y = names[image.get_label().split(",")[0]]
        assert left <= x < right and top - 2 < y <= top  # in entries of a state
    assert sorted(names, key=lambda name: names[name][::-1]) == ["layer 2", "layer 11", "layer 30"]


def test_a_difference_is_drawn_between_its_memories():
    before, more = states(range(4), 4, 8), states(range(4), 4, 8, seed=1, scale=0.01)
    after = {layer: state + more[layer] for layer, state in before.items()}
    figure = difference_figure(before, after, "Difference")
    first, second, third = blocks(figure)
    assert assert_shows(first, before) == assert_shows(second, after)
    changed = {layer: after[layer].astype(np.float64) - before[layer] for layer in before}
    assert assert_shows(third, changed) == max(np.abs(state).max() for state in changed.values())
    assert [axes.get_label() for axes in (first, second, third)] == ["before", "after", "after − before"]
    assert {"before", "after", "after − before"} <= set(words_of(figure))
    bars = [axes for axes in figure.axes if "colours" in axes.get_label()]
    assert len(bars) == 2
    for axes, bar in zip((second, third), sorted(bars, key=lambda bar: bar.get_position().x0), strict=True):
        assert bar.get_ylim() == axes.images[0].get_clim()  # positive is up, and the colour bar matches the panels
        assert bar.get_position().x0 > axes.get_position().x1
    assert_tidy(figure)


@pytest.mark.parametrize(("layers", "blocks_drawn"), [(MOST_PANELS // 12, 3), (MOST_PANELS // 12 + 1, 1)])
def test_a_large_difference_is_drawn_without_its_memories(layers, blocks_drawn):
    before, after = states(range(layers), 4, 2), states(range(layers), 4, 2, seed=1)
    figure = difference_figure(before, after, "Difference")
    drawn = blocks(figure)
    assert len(drawn) == blocks_drawn and "after − before" in words_of(figure)
    assert_shows(drawn[-1], {layer: after[layer].astype(np.float64) - before[layer] for layer in before})
    assert_tidy(figure)


def test_zeros_and_the_largest_numbers_can_be_drawn():
    zero = {0: np.zeros((1, 2, 2), dtype=np.float32)}
    (axes,) = blocks(memory_figure(zero, ""))
    assert assert_shows(axes, zero) == 1
    large = {0: np.full((1, 2, 2), np.finfo(np.float32).max)}
    figure = difference_figure({0: -large[0]}, large, "")
    assert assert_shows(blocks(figure)[2], {0: 2 * large[0].astype(np.float64)}) == 2 * float(np.finfo(np.float32).max)
    assert_tidy(figure)


def test_positive_is_red_negative_blue_and_rows_go_down():
    figure = memory_figure({0: np.array([[[1, 0], [-1, 0]]], dtype=np.float32)}, "")
    figure.canvas.draw()
    (axes,) = blocks(figure)
    box, pixels = axes.images[0].get_window_extent(), np.asarray(figure.canvas.buffer_rgba()).astype(int)

    def colour(row, column):
        x, y = box.x0 + (0.25 + column / 2) * box.width, box.y1 - (0.25 + row / 2) * box.height
        return pixels[pixels.shape[0] - round(y), round(x)]

    red, _, blue, _ = colour(0, 0)
    assert red > blue + 50
    red, _, blue, _ = colour(1, 0)
    assert blue > red + 50
    assert all(min(colour(row, 1)) > 240 for row in (0, 1))


def test_a_title_is_drawn_literally(tmp_path):
    layer_states = states([0], 1, 2)
    title = "Memory: $x_1^ 記憶.safetensors"
    assert title in words_of(memory_figure(layer_states, title))
    plot_memory(layer_states, tmp_path / "new" / "memory.png", title)
    plot_difference(layer_states, layer_states, tmp_path / "new" / "difference.png", title)
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"memory.png", "difference.png"}
    assert (tmp_path / "new" / "memory.png").read_bytes().startswith(b"\x89PNG")

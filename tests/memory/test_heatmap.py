"""The terminal view of a memory: bars proportional to norms, one coloured cell per entry."""

from __future__ import annotations

import io

import numpy as np
import pytest
from rich.console import Console

from deltamem_tool.memory.heatmap import heat_maps, norm, norm_bars, strongest_layer

BLUE, WHITE, RED = (33, 102, 172), (247, 247, 247), (178, 24, 43)


def drawn(renderable, colours=True, width=100):
    """The lines of cells, each as a character with its style."""
    system = "truecolor" if colours else None
    console = Console(file=io.StringIO(), width=width, color_system=system, force_terminal=colours)
    return [
        [(character, segment.style) for segment in line for character in segment.text]
        for line in console.render_lines(renderable, pad=False)
    ]


def text(renderable, **options):
    return ["".join(character for character, _ in line).rstrip() for line in drawn(renderable, **options)]


def rgb(colour):
    return tuple(colour.triplet)


def mixed(share):
    end = np.array(RED if share > 0 else BLUE)
    return tuple(np.rint(np.array(WHITE) + abs(share) * (end - WHITE)).astype(int))


@pytest.mark.parametrize(("heads", "rank"), [(1, 8), (4, 8), (2, 3), (1, 1), (3, 64)])
def test_every_entry_is_drawn_in_its_colour(heads, rank):
    state = np.random.default_rng(0).normal(size=(heads, rank, rank)).astype(np.float32)
    title, *lines, legend = drawn(heat_maps(7, state), width=heads * (rank + 2) + 60)
    assert "".join(character for character, _ in title) == "layer 7"
    limit = float(np.abs(state).max())
    cells = [[style for character, style in line if character == "▀"] for line in lines[1:]]
    assert len(cells) == (rank + 1) // 2
    for pair, styles in enumerate(cells):
        assert len(styles) == heads * rank
        for place, style in enumerate(styles):
            head, column = divmod(place, rank)
            assert rgb(style.color) == mixed(state[head, 2 * pair, column] / limit)
            if 2 * pair + 1 < rank:
                assert rgb(style.bgcolor) == mixed(state[head, 2 * pair + 1, column] / limit)
            else:
                assert style.bgcolor is None
    scale = [rgb(style.color) for character, style in legend if character == "▀"]
    assert (scale[0], scale[len(scale) // 2], scale[-1]) == (BLUE, WHITE, RED)
    assert f"−{limit:.2g} " in "".join(character for character, _ in legend)


def test_without_colours_entries_are_drawn_as_digits():
    state = np.array([[[9.0, -9.0], [1.0, 0.0]]], np.float32)
    assert text(heat_maps(0, state), colours=False) == [
        "layer 0",
        "head 0",
        "  9 -9",
        "  1  0",
        "−9 is −9, 9 is 9; rows are values, columns are keys",
    ]


def test_heads_wrap_in_a_narrow_terminal():
    state = np.ones((4, 8, 8), np.float32)
    assert sum("head" in line for line in text(heat_maps(0, state), width=100)) == 1
    lines = text(heat_maps(0, state), width=20)
    assert sum("head" in line for line in lines) == 2 and max(map(len, lines)) <= 20


def test_bar_lengths_are_proportional_to_norms():
    states = {0: np.full((2, 4, 4), 1.0), 3: np.full((2, 4, 4), 2.0), 5: np.zeros((2, 4, 4))}
    lines = text(norm_bars({layer: state.astype(np.float32) for layer, state in states.items()}))
    assert [line.split()[:3] for line in lines] == [["layer", "0", "5.66"], ["layer", "3", "11.3"], ["layer", "5", "0"]]
    assert [line.count("█") for line in lines] == [20, 40, 0]


def test_the_norm_of_a_large_state_does_not_overflow():
    large = np.full((1, 2, 2), np.finfo(np.float32).max)
    assert norm(large) == pytest.approx(2 * float(np.finfo(np.float32).max))
    assert strongest_layer({0: np.ones((1, 2, 2)), 1: large, 2: large}) == 1


def test_an_empty_memory_can_be_drawn():
    empty = np.zeros((1, 2, 2), np.float32)
    assert text(norm_bars({0: empty})) == ["layer 0  0"]
    assert all(
        rgb(style.color) == WHITE for line in drawn(heat_maps(0, empty))[2:-1] for cell, style in line if cell == "▀"
    )

"""Sides are measured alternately, and the clock is read at the right points. The tests use a fake clock."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import numpy as np
import pytest

from deltamem_tool.bench import BASE, MEMORY, PYTORCH
from deltamem_tool.bench.peak import Peak
from deltamem_tool.bench.result import DECODE, FIRST, PEAK, PREFILL, BenchResult, Sizes, Spread
from deltamem_tool.bench.setting import Setting, name_of
from deltamem_tool.bench.timing import Rounds, Seconds, interleave, time_generation

NAMES = ("a", "b", "c")


class Slow:
    """A side whose calls and choices take known times; the first conversation takes longer."""

    def __init__(self, time, prefill=3.0, step=0.5, choice=0.25):
        self.time, self.prefill, self.step, self.choice = time, prefill, step, choice
        self.calls = []  # (tokens in the call, past)

    def call(self, ids, past=None):
        first_of_all = not self.calls
        self.calls.append((ids.shape[1], past))
        self.time[0] += (self.prefill if past is None else self.step) + 100 * first_of_all
        return np.zeros((len(ids), 5)), (past or 0) + 1

    def choose(self, logits):
        self.time[0] += self.choice
        return np.zeros((len(logits), 1), np.int64)


def test_a_visit_times_prompt_first_token_and_later_tokens():
    time = [0.0]
    side = Slow(time)
    time_generation(side, np.zeros((2, 7), np.int64), 1, lambda: time[0])
    side.calls.clear()
    side.calls.append(None)  # warm
    took = time_generation(side, np.zeros((2, 7), np.int64), 4, lambda: time[0])
    assert took == Seconds(prefill=3.0, first_token=3.25, decode=4 * 0.75)
    assert side.calls[1:] == [(7, None), (1, 1), (1, 2), (1, 3), (1, 4)]


def timed(seed, repeats=4):
    time, begun = [0.0], []
    sides = {name: Slow(time, prefill=1.0 + i) for i, name in enumerate(NAMES)}
    ids = np.zeros((1, 7), np.int64)
    visits = {name: partial(time_generation, side, ids, 2, lambda: time[0]) for name, side in sides.items()}
    return interleave(visits, repeats, seed, begun.append), begun


def test_every_side_is_visited_once_in_every_repeat_and_warmed_up_before():
    measured, begun = timed(seed=0)
    rounds = [begun[start : start + 3] for start in range(0, len(begun), 3)]
    assert len(rounds) == 5 and all(sorted(names) == sorted(NAMES) for names in rounds)
    assert measured.order == rounds[1:]
    for i, name in enumerate(NAMES):  # the 100 seconds of the first conversation are not counted
        assert measured.values[name] == [Seconds(1.0 + i, 1.25 + i, 1.5)] * 4


def test_the_order_of_each_repeat_is_drawn_from_the_seed():
    orders = [timed(seed, repeats=8)[0].order for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert any(a != b for a, b in pairwise(orders[0]))


@pytest.fixture
def result():
    """Two conversations at once, on a machine that is half as fast in the second repeat."""
    setting = Setting("adapter", models=(BASE, MEMORY), prompts=(100,), decode=10, batch_size=2, repeats=3)
    base = [Seconds(1, 1, 2), Seconds(2, 2, 4), Seconds(1, 1, 2)]
    memory = [Seconds(2, 3, 2), Seconds(4, 6, 8), Seconds(3, 3, 2)]
    names = [name_of(PYTORCH, model) for model in setting.models]
    peaks = {names[0]: Peak(1000, {100: 10_000_000}), names[1]: Peak(1000, {100: 15_000_000})}
    seconds = Rounds(dict(zip(names, (base, memory), strict=True)), [names, names[::-1], names])
    about = {
        "base_model": "base",
        "quantize": "int8",
        "machine": {"cpu": "cpu", "gpu": None, "threads": 1},
        "packages": {"torch": "2"},
    }
    return BenchResult(setting, about, {100: seconds}, peaks, Sizes(500, 400, {100: 5000}))


def test_figures_are_medians_and_ratios_are_taken_within_each_repeat(result):
    base, memory = (result.figures(100, PYTORCH, model) for model in (BASE, MEMORY))
    assert base[PREFILL].value == Spread(200, 150, 200) and base[DECODE].value == Spread(10, 7.5, 10)
    assert all(figure.ratio is None for figure in base.values())
    assert memory[FIRST].value == Spread(3, 3, 4.5)
    assert memory[PREFILL].ratio == Spread(0.5, pytest.approx(1 / 3), 0.5)
    assert memory[FIRST].ratio == Spread(3, 3, 3)  # the same ratio for the medians, but not for the means
    assert memory[DECODE].ratio == Spread(1, 0.5, 1)
    assert memory[PEAK].value.median == 15_000_000 and memory[PEAK].ratio.median == 1.5


def test_there_is_no_ratio_to_a_peak_of_zero(result):
    result.peaks[name_of(PYTORCH, BASE)] = Peak(1000, {100: 0})
    figure = result.figures(100, PYTORCH, MEMORY)[PEAK]
    assert figure.value.median == 15_000_000 and figure.ratio is None
    assert result.table(100).row_count == 2


def test_a_table_of_80_columns_shows_every_figure(result):
    from rich.console import Console

    console = Console(width=80, file=None, record=True, quiet=False, force_terminal=False)
    with console.capture() as capture:
        console.print(result.table(100))
    output = capture.get()
    for figure in ("200", "150–200", "0.50× 0.33–0.50", "3,000", "15", "1.50×", "PyTorch", "memory"):
        assert figure in output, output
    assert max(map(len, output.splitlines())) <= 80 and "…" not in output
    text = "\n".join(result.sentences())
    assert (
        "quantised int8" in text
        and "500 bytes" in text
        and "5,000 (10.0× the file) of 100" in text
        and "LoRA" not in text
    )


def test_without_peaks_the_table_has_no_peak_column(result):
    result = BenchResult(result.setting, result.about, result.rounds, {}, result.sizes)
    assert PEAK not in result.figures(100, PYTORCH, MEMORY)
    assert [str(column.header).split("\n")[0] for column in result.table(100).columns] == [
        "",
        "prefill",
        "first token",
        "decode",
    ]

"""Comparing two evaluations: paired by question where both asked the same, by means otherwise, or an error."""

from __future__ import annotations

import json
from math import sqrt

import numpy as np
import pytest
from evaluation.reported import evaluation_of, share_of, write_records

from deltamem_tool.errors import ConfigError, DataError
from deltamem_tool.evaluation.conditions import EvalProtocol, conditions_of
from deltamem_tool.evaluation.records import RECORDS_FILE
from deltamem_tool.evaluation.report import compare as module
from deltamem_tool.evaluation.report.compare import compare
from deltamem_tool.evaluation.scoring.statistics import Estimate, difference_of_means

QUESTIONS = 40


def better(condition: str, number: int) -> float:
    """Like `share_of`, but every second question that the state missed is right, and full context answers all."""
    if condition == "full_context" or (condition == "state" and number % 8 == 0):
        return 1.0
    return share_of(condition, number)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("two")
    run = {"options": {"dtype": "float32", "batch_size": 4}, "mechanism": {"rank": 4}, "versions": {"torch": "2"}}
    other = {**run, "options": {"dtype": "bfloat16", "batch_size": 4}, "cost": None}
    write_records(root / "a", evaluation_of(share_of, QUESTIONS), run=run)
    write_records(root / "b", evaluation_of(better, QUESTIONS), "b" * 64, run=other)
    write_records(root / "others", evaluation_of(better, QUESTIONS), "b" * 64, items="others")
    return root


def row_of(comparison, condition, group=None, is_gain=False):
    rows = comparison.gains if is_gain else comparison.rows
    return next(row for row in rows if (row.condition, row.group) == (condition, group))


def test_a_margin_is_compared_with_the_whole_interval(folders):
    comparison = compare(folders / "a", folders / "b", 0.5)
    places = {
        (row["condition"], row["is_gain"]): row["beside_margin"]
        for row in comparison.to_json()["differences"]
        if row["group"] is None
    }
    assert places["state", False] == "within" and places["full_context", False] == "beyond"
    assert "full context: B is 1.00 ± 0.15 higher than A, more than the margin of 0.5" in comparison.verdict()
    without = compare(folders / "a", folders / "b").to_json()["differences"]
    assert not any("beside_margin" in row for row in without)
    with pytest.raises(ConfigError, match="Invalid margin: 0"):
        compare(folders / "a", folders / "b", 0)


def test_the_same_questions_are_paired(folders):
    comparison = compare(folders / "a", folders / "b" / "evaluation.json")
    assert not comparison.unpaired and comparison.notes == ["paired by question (40 questions)"]
    state = row_of(comparison, "state")
    assert (state.a[0], state.b[0], state.mean) == (0.75, 0.875, 0.125) and state.histories == 20
    # 5 histories gained one question: of the signs of 5, all are alike in 2 of 32 patterns.
    assert state.p_value == pytest.approx(2 / 32, abs=0.015) and not state.is_clear
    rng, gained = np.random.default_rng(5), np.repeat([1.0, 0.0], [5, 15])
    naive = np.quantile([rng.choice(gained, 20).mean() / 2 for _ in range(4000)], [0.025, 0.975])
    assert (state.low, state.high) == pytest.approx(tuple(naive), abs=0.026)  # the means move in steps of 0.025
    full = row_of(comparison, "full_context", "2 facts")
    assert (full.a[0], full.b[0], full.mean) == (0, 1, 1) and full.is_clear
    over = row_of(comparison, "full_context", is_gain=True)
    assert (over.a[0], over.b[0]) == (0.75, -0.125) and over.mean == pytest.approx(-0.875) and over.is_clear
    assert "state: the difference is not distinguishable from 0 (+0.12 ± 0.10)" in comparison.verdict()
    assert any(line.startswith("state over full context: B is 0.88 ± 0.1") for line in comparison.verdict())
    # All histories alike: 3 / 20 to each side, cut at 1.
    assert any(line == "full context: B is 1.00 ± 0.15 higher than A" for line in comparison.verdict())
    assert comparison.differing == [
        ("Evaluation", "dtype", "float32", "bfloat16"),
        ("Adapter", "fingerprint", "a" * 64, "b" * 64),
    ]


def test_gains_may_differ_by_more_than_1(tmp_path):
    """A gain runs from 1 below the full context to 1 above it."""
    below = evaluation_of(lambda condition, _: float(condition == "full_context"))
    above = evaluation_of(lambda condition, _: float(condition == "state"))
    comparison = compare(write_records(tmp_path / "below", below), write_records(tmp_path / "above", above))
    over = row_of(comparison, "full_context", is_gain=True)
    assert over.mean == 2 and over.low < 2 == over.high


def test_other_questions_are_not_paired(folders):
    comparison = compare(folders / "a", folders / "others")
    assert comparison.unpaired == "they asked different questions" and comparison.to_json()["paired"] is False
    assert (
        any("independent samples" in note for note in comparison.notes)
        and "B does not record how it was run" in comparison.notes
    )
    state = row_of(comparison, "state")
    assert state.p_value is None and state.mean == 0.125
    apart = sqrt((state.b[0] - state.b[1]) ** 2 + (state.a[2] - state.a[0]) ** 2)
    assert state.low == pytest.approx(0.125 - apart) and not state.is_clear
    assert row_of(comparison, "full_context").is_clear


def test_reports_that_name_no_questions_are_not_paired(tmp_path):
    one, other = (write_records(tmp_path / name, evaluation_of(), items="") for name in ("one", "other"))
    assert compare(one, other).unpaired


def test_intervals_of_two_means_are_combined_as_published():
    """56 of 70 against 48 of 80, Newcombe (1998), method 10: 0.2, and from 0.0524 to 0.3339."""

    def wilson(right: int, of: int, z: float = 1.959964) -> tuple[float, float, float]:
        middle, half = 2 * right + z**2, z * sqrt(z**2 + 4 * right * (1 - right / of))
        return right / of, (middle - half) / (2 * (of + z**2)), (middle + half) / (2 * (of + z**2))

    difference = difference_of_means(wilson(56, 70), wilson(48, 80))
    assert (difference.mean, difference.low, difference.high) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)
    assert difference_of_means((1, 0.5, 1.5), (0, -1, 1)) == Estimate(1, 1 - sqrt(1.25), 1 + sqrt(1.25))


@pytest.mark.parametrize("change", ["missing", "edited", "none", "foreign"])
def test_records_that_do_not_match_the_scores_are_ignored(folders, tmp_path, change):
    folder = write_records(tmp_path / "b", evaluation_of(better, QUESTIONS))
    records = folder / RECORDS_FILE
    lines = records.read_text().splitlines(keepends=True)
    says = "do not match evaluation.json"
    if change == "missing":
        records.write_text("".join(lines[1:]))
    elif change == "edited":
        at = next(at for at, line in enumerate(lines) if '"exact": 0.0' in line)
        records.write_text("".join([*lines[:at], lines[at].replace('"exact": 0.0', '"exact": 1.0'), *lines[at + 1 :]]))
    elif change == "none":
        records.unlink()
        says = "has no records"
    else:
        settings = folder / "settings.json"
        settings.write_text(settings.read_text().replace("a" * 64, "c" * 64))
        says = "belong to another evaluation"
    comparison = compare(folders / "a", folder)
    assert says in comparison.unpaired and row_of(comparison, "state").p_value is None


def test_conditions_and_groups_of_only_one_side_are_reported(folders, tmp_path):
    conditions = conditions_of(EvalProtocol.parse("memory"))
    fewer = evaluation_of(share_of, QUESTIONS, conditions=[conditions[0], conditions[2]], groups=("1 fact", "9 facts"))
    comparison = compare(folders / "a", write_records(tmp_path / "fewer", fewer, items="fewer"))
    assert {"only A has the condition zero state", "only A has the group 2 facts", "only B has the group 9 facts"} <= {
        *comparison.notes
    }
    assert (
        {row.condition for row in comparison.rows} == {"state", "donor_state"}
        and not comparison.overall
        and not comparison.gains
    )
    assert {row.group for row in comparison.rows} == {"1 fact"} and comparison.verdict()[0].startswith(
        "1 fact, state: "
    )


def test_evaluations_that_cannot_be_compared_raise(folders, tmp_path):
    def changed(name, **changes):
        content = json.loads((folders / "a" / "evaluation.json").read_text())
        (tmp_path / name).write_text(json.dumps({**content, **changes}))
        return tmp_path / name

    for other, says in (
        (changed("task.json", task="recall"), "different tasks: places and recall"),
        (changed("metric.json", metric="f1"), "different metrics"),
        (changed("protocol.json", protocol="full"), "different protocols.*has no records"),
        (changed("run.json", run={"options": 3}), "is incomplete"),
        (changed("differences.json", differences={"donor_state": {"mean": "1"}}), "is incomplete"),
        (tmp_path, "There is no evaluation.json in it"),
        (tmp_path / "nowhere", "no such file or folder"),
    ):
        with pytest.raises(DataError, match="(?s)" + says):
            compare(folders / "a", other)
    full = write_records(tmp_path / "full", evaluation_of(better, QUESTIONS, protocol="full"))
    comparison = compare(folders / "a", full)  # the same questions, to see the effect of the context
    assert not comparison.unpaired and ("Evaluation", "protocol", "memory", "full") in comparison.differing


def test_the_compare_command_prints_the_differences(folders, tmp_path, deltamem, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = deltamem("compare", folders / "a", folders / "b", "--out", "compared.json")
    assert result.code == 0, result.err
    for sentence in ("Full context: B is 1.00 ± 0.15 higher than A.", "Paired by question", "bfloat16"):
        assert sentence in result.out
    cells = [
        [cell.strip() for cell in line.strip("│").split("│")] for line in result.out.splitlines() if line[0] == "│"
    ]
    rows = cells[next(at for at, row in enumerate(cells) if row[0].startswith("adapter: fingerprint")) :]
    assert "".join(row[1] for row in rows) == "a" * 64 and "".join(row[2] for row in rows) == "b" * 64
    printed = json.loads(deltamem("compare", folders / "a", folders / "b", "--json").out)
    assert printed == json.loads((tmp_path / "compared.json").read_text())
    assert printed["format"] == module.FORMAT and printed["paired"] and printed["verdict"]
    deltamem("compare", folders / "a", "nowhere").assert_short_error("nowhere is not a report", code=1)
    deltamem("compare", folders / "a").assert_short_error("Missing argument", code=2)

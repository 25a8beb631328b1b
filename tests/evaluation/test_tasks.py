"""Finding tasks, the recall task, and published metrics."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from evaluation.asked import Asked, item

from deltamem_tool import DeltaMemConfig
from deltamem_tool.adapter.create import create_adapter
from deltamem_tool.cli.evaluate import command
from deltamem_tool.data import dialogues
from deltamem_tool.errors import ConfigError, DataError
from deltamem_tool.evaluation.conditions import EvalProtocol, conditions_of
from deltamem_tool.evaluation.records import Record
from deltamem_tool.evaluation.report.evaluation_file import evaluation_json, read_evaluation
from deltamem_tool.evaluation.report.tables import plot_scores, score_table
from deltamem_tool.evaluation.result import Evaluation
from deltamem_tool.evaluation.scoring.metrics import best_score, contains, exact_match, normalise, token_f1
from deltamem_tool.evaluation.task import find_task, scores_of
from deltamem_tool.evaluation.tasks.recall import Recall


def test_facts_are_held_out_and_repeatable():
    items = Recall((4,), 50, seed=3).items()
    assert items == Recall((4,), 50, seed=3).items() != Recall((4,), 50, seed=4).items()
    held_out = {fact.answer for _, facts in dialogues.SPLITS.values() for fact in facts}
    assert all(each.answers[0] in held_out for each in items)
    assert all(each.answers[0] not in str(each.history) for each in items)  # in other words
    for each in items:
        value = each.answers[0].rstrip(".").split()[-1]
        assert any(value in message["content"] for message in each.history[0])
    assert len({each.id for each in items}) == len({each.history_id for each in items}) == 50
    with pytest.raises(ConfigError, match="numbers of facts"):
        Recall((0,))


def test_tasks_are_found_by_name():
    assert find_task("recall", {"facts": (2,), "episodes": 3}).items()[0].group == "2 facts"
    assert isinstance(find_task("evaluation.asked:Asked", {"items": [item(1)]}), Asked)
    for name, options, says in (
        ("recal", {}, "no task 'recal'"),
        ("nowhere.tasks:Mine", {}, "cannot be imported"),
        ("evaluation.asked:Nothing", {}, "cannot be imported"),
        (":Asked", {}, "cannot be imported.\n'' is not the full name of a module"),
        (".asked:Asked", {}, "cannot be imported.\n'.asked' is not the full name of a module"),
        ("evaluation.asked:dialogues", {}, "cannot be imported.\ndialogues is not a class"),
        ("recall", {"data": "talks.jsonl"}, "does not take these options"),
        ("evaluation.asked:Asked", {"items": 3, "more": 1}, "does not take these options"),
    ):
        with pytest.raises(ConfigError, match=says):
            find_task(name, options)
    with pytest.raises(TypeError, match="not iterable"):  # a bug in the task is not reported as invalid options
        find_task("evaluation.asked:Asked", {"items": 3})


def test_the_documented_task_runs(tmp_path, monkeypatch, checkpoint):
    """The documented class is written to a file beside the data, and the command evaluates it."""
    text = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
    (tmp_path / "pets.py").write_text(text.split("### Your own")[1].split("```python\n")[1].split("```")[0])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    create_adapter(str(checkpoint), DeltaMemConfig(rank=4), "adapter")
    options = ["adapter", "--task", "pets:Pets", "--data", "pets.jsonl", "--records", "answers", "--json"]
    for _ in range(2):  # the second time, no question is left
        result = CliRunner().invoke(command, options)
        report = json.loads(result.stdout)
        assert report["task"] == "pets" and report["groups"] == ["dogs"] and report["questions"] == [2]
    records = [json.loads(line) for line in Path("answers/records.jsonl").read_text().splitlines()]
    assert len(records) == 2 * len(report["conditions"]) and records[0]["scores"].keys() == {"f1", "em"}
    assert json.loads(Path("answers/settings.json").read_text())["options"] == {"data": "pets.jsonl"}
    other = CliRunner().invoke(command, [*options, "--protocol", "full"])
    assert isinstance(other.exception, DataError) and "protocol" in str(other.exception)
    elsewhere = ["adapter", "--task", "pets:Pets", "--set", f"data={tmp_path}/pets.jsonl", "--json"]
    printed = CliRunner().invoke(command, elsewhere).stdout  # a model card shows the arguments
    assert json.loads(printed)["arguments"][-2:] == ["--set", "data=pets.jsonl"] and str(tmp_path) not in printed


@pytest.mark.parametrize(
    "scores", [{"f1": 1.0}, {"exact": math.nan, "f1": 1.0}, {"exact": 1.0, "f1": 5}, {"exact": "1"}]
)
def test_scores_of_a_task_are_numbers_from_0_to_1(scores):
    wrong = Asked()
    wrong.score = lambda item, answer: scores
    with pytest.raises(ConfigError, match=r"The task asked scores the answer to talks:1 with (exact|f1) = "):
        scores_of(wrong, item(1), "1")
    wrong.score = lambda item, answer: {"exact": np.float32(0.5), "f1": True, "words": 3}
    assert json.dumps(scores_of(wrong, item(1), "1")) == '{"exact": 0.5, "f1": 1.0, "words": 3}'


@pytest.mark.parametrize(
    ("answer", "right", "same", "f1"),
    [
        ("The Eiffel Tower!", "eiffel tower", 1, 1),
        ("  a  cat ", "Cat", 1, 1),
        ("in Paris, France", "Paris", 0, 2 * (1 / 3) * 1 / (1 / 3 + 1)),
        ("red red blue", "red blue blue", 0, 2 / 3),  # each word as often as both contain it
        ("yes it is", "yes", 0, 0),  # HotpotQA: yes and no are whole answers
        ("yes", "yes", 1, 1),
        ("yes", "Yes, Minister", 0, 0),  # on both sides
        ("no", "noanswer", 0, 0),
        ("NoAnswer!", "noanswer", 1, 1),
        ("", "Paris", 0, 0),
        ("the", "an", 1, 0),  # both are empty after normalisation: an exact match by SQuAD, and no common word
    ],
)
def test_metrics_match_the_published_ones(answer, right, same, f1):
    """`exact_match_score` and `f1_score` of HotpotQA's `hotpot_evaluate_v1.py`."""
    assert exact_match(answer, right) == same and token_f1(answer, right) == pytest.approx(f1)


def test_the_best_of_several_answers_counts():
    assert best_score(token_f1, "New York", ["York", "new york"]) == 1.0
    assert contains("It was Paris, in 1990.", "paris") == 1.0 and contains("London", "paris") == 0.0
    assert normalise("An apple — a day") == "apple — day"  # only ASCII punctuation, as the scripts have it


def found(seed: int = 0) -> Evaluation:
    conditions = conditions_of(EvalProtocol.parse("memory"))
    records = [
        Record(f"{n}", f"{n}", f"{1 + n % 2} facts", c.name, "?", "a", ["b"], {"exact": float(c.name == "state")}, 5)
        for c in conditions
        for n in range(8)
    ]
    return Evaluation("recall", "memory", ["exact"], conditions, ["1 facts", "2 facts"], records, seed)


def test_an_evaluation_file_is_read_back(tmp_path):
    content = evaluation_json(found(), "f" * 64, ["--task", "recall"])
    (tmp_path / "evaluation.json").write_text(json.dumps(content))
    assert read_evaluation(tmp_path / "evaluation.json") == content
    assert content["scores"]["state"] == [[1.0, 0.25, 1.0]] * 2 and content["questions"] == [4, 4]
    assert content["differences"]["donor_state"]["mean"] == 1.0
    assert "the state adds 1.00 ± 0.38 over donor state" in content["verdict"]
    optional = {
        "differences",
        "group_differences",
        "other_metrics",
        "other_scores",
        "deltamem_version",
        "format_version",
    }
    for name in content.keys() - optional:
        (tmp_path / "less.json").write_text(json.dumps({key: value for key, value in content.items() if key != name}))
        with pytest.raises(DataError, match=r"less.json"):
            read_evaluation(tmp_path / "less.json")


def test_scores_are_shown_as_a_table_and_a_plot(tmp_path):
    assert score_table(found()).row_count == len(found().conditions)
    plot_scores(found(), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")

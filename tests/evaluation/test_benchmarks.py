"""LoCoMo and HotpotQA: read and scored as published; errors name file and item."""

from __future__ import annotations

import json

import pytest
from evaluation.published import QUESTION, TALK, write

from deltamem_tool.errors import DataError
from deltamem_tool.evaluation.task import find_task
from deltamem_tool.evaluation.tasks.locomo import stemmed_f1


@pytest.fixture
def locomo(tmp_path):
    return find_task("locomo", {"data": write(tmp_path / "locomo10.json", [TALK])})


def test_locomo_is_read(locomo):
    items = locomo.items()
    assert [item.group for item in items] == ["multi-hop", "temporal", "open domain", "single-hop", "adversarial"]
    assert {item.history_id for item in items} == {"talk-7"} and items[3].id == "talk-7/4"
    first, second = items[0].history  # a session without turns is skipped
    assert first == [
        {
            "role": "user",
            "content": "(1 pm on 8 May, 2023) Ann: I ran a race.\nAnn: It rained. (shows a picture: a wet road)",
        },
        {"role": "assistant", "content": "(1 pm on 8 May, 2023) Ben: Well done!"},
    ]
    assert [message["role"] for message in second] == ["user", "assistant"]
    assert [list(item.answers) for item in items] == [
        ["ran a race, Oslo"],
        ["2023"],
        ["Likely yes"],
        ["Oslo"],
        ["not mentioned"],
    ]
    assert "dates" in items[1].question[-1]["content"] and "dates" not in items[3].question[-1]["content"]
    assert items[4].where.endswith("locomo10.json conversation 1 question 5")


@pytest.mark.parametrize(
    ("number", "answer", "score"),
    [
        (0, "Oslo, ran the races", 1.0),  # in any order, and in other forms of the words
        (0, "Oslo", 0.5),
        (0, "ran a race and Oslo", (0.8 + 0.5) / 2),  # one answer without a comma: 2 of its 3 words, and 1
        (1, "2023", 1.0),
        (1, "2,023", 1.0),  # a comma is not part of a word
        (2, "likely yes", 1.0),
        (2, "Likely yes; she runs races", 4 / 7),  # the explanation is cut off the right answer: 2 of 5 words
        (3, "He lives in Oslo", 0.4),
        (3, "", 0.0),
        (4, "That was Not mentioned.", 1.0),
        (4, "No information available", 1.0),
        (4, "not said", 0.0),
        (4, "8 May", 0.0),
    ],
)
def test_locomo_is_scored_as_published(locomo, number, answer, score):
    """By category, as `eval_question_answering` of `task_eval/evaluation.py` calls its `f1` and `f1_score`."""
    assert locomo.score(locomo.items()[number], answer) == {"f1": pytest.approx(score)}


def test_words_are_stemmed_by_porters_algorithm():
    assert stemmed_f1("running", "runs") == 1.0 and stemmed_f1("The cat and a dog", "cats, dogs") == 1.0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"qa": [{"question": "?", "answer": "a", "category": 9}]}, "question 1"),
        ({"qa": [{"question": "?", "answer": "a", "category": [1]}]}, "question 1"),
        ({"qa": [{"question": "", "answer": "a", "category": 4}]}, "question 1"),
        ({"qa": ["When?"]}, "question 1"),
        ({"qa": 3}, "conversation 1"),
        ({"conversation": {"speaker_a": "Ann"}}, "conversation 1"),
        ({"conversation": {**TALK["conversation"], "session_2": [{"speaker": "Ben", "text": 3}]}}, "conversation 1"),
        ({"conversation": None}, "conversation 1"),
        ({"qa": None}, "conversation 1"),
    ],
)
def test_files_that_are_not_locomo_are_named(tmp_path, change, says):
    content = {key: value for key, value in {**TALK, **change}.items() if value is not None}
    with pytest.raises(DataError, match=f"locomo.json {'conversation 1 ' if 'question' in says else ''}{says}"):
        find_task("locomo", {"data": write(tmp_path / "locomo.json", [content])}).items()


def test_hotpotqa_is_read_and_scored(tmp_path):
    lists = {"title": ["Ann", "Ben"], "sentences": [["Ann ran.", " She won."], ["Ben ran too."]]}
    of_hub = {**{key: value for key, value in QUESTION.items() if key != "_id"}, "id": "5a8b", "context": lists}
    (item,) = find_task("hotpotqa", {"data": write(tmp_path / "hotpot.json", [QUESTION])}).items()
    task = find_task("hotpotqa", {"data": write(tmp_path / "hotpot.jsonl", json.dumps(of_hub) + "\n")})
    (same,) = task.items()
    assert (item.id, item.history, item.answers, item.group) == (same.id, same.history, same.answers, same.group)
    assert item.history[0][0] == {"role": "user", "content": "Ann\nAnn ran. She won."} and len(item.history[0]) == 4
    assert task.score(item, "Yes.") == {"f1": 1.0, "em": 1.0} and task.score(item, "yes, both") == {
        "f1": 0.0,
        "em": 0.0,
    }


@pytest.mark.parametrize(
    "change", [{"answer": ""}, {"context": []}, {"context": {"title": ["a"], "sentences": []}}, {"type": 3}]
)
def test_files_that_are_not_hotpotqa_are_named(tmp_path, change):
    with pytest.raises(DataError, match=r"hotpot.json question 2 is not a HotpotQA question"):
        find_task("hotpotqa", {"data": write(tmp_path / "hotpot.json", [QUESTION, {**QUESTION, **change}])}).items()

"""Histories, questions, right and outdated answers in each variant of the recall task."""

from __future__ import annotations

import hashlib
import json
import random
import re

import pytest

from deltamem_tool.data import dialogues
from deltamem_tool.errors import ConfigError
from deltamem_tool.evaluation.task import find_task
from deltamem_tool.evaluation.tasks.natural_recall import NaturalRecall
from deltamem_tool.evaluation.tasks.recall import Recall

# Of the task's 1,200 items without options, which the figures in the documents are based on.
USUAL = "bcfcf800c6150862156938293ccb754b1e4bff3744481a1c0e753307c49fcf79"


def statements_of(item):
    """(attribute, value, whether it is stated as a change), in the user's order."""
    messages = [message for session in item.history for message in session]
    assert [message["role"] for message in messages] == ["user", "assistant"] * (len(messages) // 2)
    contents = [message["content"] for message in messages[::2]]
    changes = [form.split("{")[0] for form in dialogues.CHANGES]
    statements = []
    for text in contents:
        match = re.search(r"[Mm]y (\w+) is (\w+)", text)
        if match is not None:
            is_change = any(text.startswith(words) for words in changes if words != "My ")
            statements.append((match[1], match[2], is_change))
    return statements


def turns(item):
    return sum(len(session) for session in item.history) // 2


def question_of(item):
    """(attribute, value) of an item's answer."""
    return re.fullmatch(r"Your (\w+) is (\w+)\.", item.answers[0]).groups()


def digest(items):
    content = [[each.id, each.history_id, each.history, each.question, each.answers, each.group] for each in items]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def test_items_without_options_match_the_recorded_digest():
    usual = Recall()
    assert digest(usual.items()) == USUAL and usual.metrics == ("exact",)
    assert Recall((2,), 5, delay=0, kind="stated", between="facts").items() == Recall((2,), 5).items()


@pytest.mark.parametrize(("kind", "corrected"), [("changed", True), ("contradicted", False)])
def test_a_fact_stated_twice_has_an_old_value(kind, corrected):
    task = Recall([1, 4], 20, kind=kind)
    for item in task.items():
        attribute, value = question_of(item)
        statements = [(said, is_change) for name, said, is_change in statements_of(item) if name == attribute]
        (old, first), (new, second) = statements
        assert (new, first, second) == (value, False, corrected) and old != new
        assert statements_of(item)[-1][:2] == (attribute, value)  # nothing is stated after it
        assert attribute in item.question[-1]["content"] and value not in str(item.question)
        stale = dialogues.ANSWER.format(a=attribute, v=old)
        assert task.score(item, item.answers[0]) == {"exact": 1.0, "old": 0.0}
        assert task.score(item, stale) == {"exact": 0.0, "old": 1.0}
        assert task.score(item, "Okay.") == {"exact": 0.0, "old": 0.0}
        assert (
            len({name for name, *_ in statements_of(item)})
            == len(statements_of(item)) - 1
            == int(item.group.split()[0])
        )
    assert task.metrics == ("exact", "old")


@pytest.mark.parametrize("between", ["small_talk", "facts"])
def test_the_delay_follows_all_facts(between):
    items = Recall([2], 12, kind="changed", delay=[0, 3, 50], between=between).items()
    assert [item.group for item in items[::12]] == [
        "2 facts, 0 turns later",
        "2 facts, 3 turns later",
        "2 facts, 50 turns later",
    ]
    for item in items:
        delay = int(item.group.split(", ")[1].split()[0])
        attribute, value = question_of(item)
        last = [place for place, (name, *_) in enumerate(statements_of(item)) if name == attribute][-1]
        since = statements_of(item)[last + 1 :]
        assert statements_of(item)[last][1] == value
        assert len(since) == (delay if between == "facts" else 0)
        assert len({name for name, *_ in since}) == min(len(since), len(dialogues.KIND_OF) - 2)
        values = {}
        for name, stated, is_change in since:  # repeated facts have new values
            assert is_change == (name in values) and values.get(name) != stated
            values[name] = stated
        in_all = [message["content"] for message in item.history[0][::2]]
        place = max(i for i, text in enumerate(in_all) if re.search(f"my {attribute} is {value}", text, re.IGNORECASE))
        assert turns(item) - 1 - place == delay


def test_distractors_of_the_asked_kind_come_first():
    for item in Recall([2], 30, distractors=5).items():
        attribute, _ = question_of(item)
        names = {name for name, *_ in statements_of(item)}
        kinds = [dialogues.KIND_OF[name].question for name in names]
        assert len(names) == 7 and kinds.count(dialogues.KIND_OF[attribute].question) == 4
    told_first = [dialogues.Fact("door", "navy"), dialogues.Fact("dog", "Rex")]
    for seed in range(5):
        names = [fact.attribute for fact in dialogues.similar_facts(random.Random(seed), told_first, 7, held_out=True)]
        assert set(names[:3]) == {"car", "bike", "boat"} and set(names[3:6]) == {"cat", "horse", "parrot"}
    assert Recall([2], 3, distractors=5).items() != Recall([2], 3, distractors=4).items()


def test_every_value_is_held_out():
    held_out = {fact for _, facts in dialogues.SPLITS.values() for fact in facts}
    for item in Recall([3], 10, kind="contradicted", delay=[40], between="facts", distractors=4).items():
        assert all(dialogues.Fact(name, value) in held_out for name, value, _ in statements_of(item))


def is_unanswerable(item):
    return item.group.endswith(", never told")


@pytest.mark.parametrize("options", [{}, {"distractors": 5}, {"delay": 40, "between": "facts"}, {"kind": "changed"}])
def test_unanswerable_questions_ask_for_facts_never_stated(options):
    task = Recall([1, 4], 40, unanswerable=0.3, **options)
    items = task.items()
    alike = 0
    assert [sum(is_unanswerable(item) for item in part) for part in (items[:40], items[40:])] == [12, 12]
    for item in filter(is_unanswerable, items):
        names = {name for name, *_ in statements_of(item)}
        (attribute,) = re.fullmatch(r"You have not told me about your (\w+)\.", item.answers[0]).groups()
        assert attribute not in names and re.search(rf"\b{attribute}\b", item.question[-1]["content"])
        alike += any(dialogues.KIND_OF[name] == dialogues.KIND_OF[attribute] for name in names)
        assert task.score(item, item.answers[0])["exact"] == 1.0
    assert alike > 0 and (options or alike < 24)  # of the same kind as a stated fact, and of other kinds


@pytest.mark.parametrize("later", [{}, {"delay": 4, "between": "facts"}], ids=["at once", "after other facts"])
@pytest.mark.parametrize("task", [Recall, NaturalRecall])
def test_conversations_beside_unanswerable_questions_stay_the_same(task, later):
    usual = {item.id: item for item in task([2], 30, **later).items()}
    others = [item for item in task([2], 30, unanswerable=0.5, **later).items() if not is_unanswerable(item)]
    assert len(others) == 15
    assert all(item == usual[item.id] for item in others)


def test_unanswerable_questions_leave_the_other_items_unchanged():
    usual = {item.id: item for item in Recall([2, 6], 30).items()}
    mixed = Recall([2, 6], 30, unanswerable=0.5).items()
    assert [item.id for item in mixed] == list(usual)
    for item in mixed:
        same = usual[item.id]
        assert item.history == same.history
        assert (item == same) == (not is_unanswerable(item)) == (item.question == same.question)
    assert {item.group for item in mixed} == {"2 facts", "2 facts, never told", "6 facts", "6 facts, never told"}
    assert not any(map(is_unanswerable, usual.values())) and all(
        map(is_unanswerable, Recall(2, 5, unanswerable=1).items())
    )


def test_a_false_answer_names_a_wrong_value():
    task = Recall([2], 20, unanswerable=0.5)
    assert task.metrics == ("exact", "false_answer")
    answerable, unanswerable = (next(i for i in task.items() if is_unanswerable(i) == kind) for kind in (False, True))
    (_, value), (attribute,) = question_of(answerable), re.findall(r"(\w+)\.$", unanswerable.answers[0])
    other = "Rex" if value != "Rex" else "Bella"
    for item, answer, exact, false in [
        (answerable, answerable.answers[0], 1.0, 0.0),
        (answerable, f"It is {value}, I think.", 0.0, 0.0),
        (answerable, f"Your dog is {other.lower()}!", 0.0, 1.0),
        (answerable, f"Your dog is {value} or {other}.", 0.0, 1.0),
        (answerable, "You have not told me about your dog.", 0.0, 0.0),
        (unanswerable, unanswerable.answers[0], 1.0, 0.0),
        (unanswerable, f"You have not told me about your {attribute}, but {other}.", 0.0, 1.0),
        (unanswerable, f"Your {attribute} is {value}.", 0.0, 1.0),
        (unanswerable, f"Your {attribute} is.", 0.0, 0.0),
    ]:
        assert task.score(item, answer) == {"exact": exact, "false_answer": false}, answer


def test_metrics_are_the_same_for_all_questions_of_a_task():
    task = Recall([2], 20, kind="changed", unanswerable=0.5)
    assert task.metrics == ("exact", "old", "false_answer")
    assert {tuple(task.score(item, "Okay.")) for item in task.items()} == {task.metrics}


def test_sessions_split_a_history_without_changing_it():
    whole, cut = (Recall([6], 5, delay=[7], session=session).items() for session in (None, 4))
    for one, other in zip(whole, cut, strict=True):
        assert [message for session in other.history for message in session] == one.history[0]
        assert {len(session) for session in other.history[:-1]} == {8} and len(other.history[-1]) <= 8
        assert (one.id, one.question, one.answers) == (other.id, other.question, other.answers)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"facts": []}, "numbers of facts must be from 1 to 36"),
        ({"facts": [1, 37]}, "numbers of facts must be from 1 to 36"),
        ({"facts": [True]}, "numbers of facts"),
        ({"facts": "1,2"}, "It is '1,2'"),
        ({"facts": [4, 1, 4]}, "The numbers of facts contain a duplicate"),
        ({"delay": [-1]}, "delays must be 0 or more"),
        ({"delay": 1.5}, "delays must be 0 or more"),
        ({"episodes": 0}, "episodes must be 1 or more"),
        ({"distractors": None}, "distractors must be 0 or more"),
        ({"session": 0}, "turns of a session must be 1 or more"),
        ({"kind": "stale"}, "no kind 'stale'"),
        ({"between": "tokens"}, "no between 'tokens'"),
        ({"facts": [30], "distractors": 7}, "This one tells 37"),
        ({"facts": [36], "delay": 1, "between": "facts"}, "none for the delay"),
        ({"facts": [36], "unanswerable": 0.5}, "none for a question about none of them"),
        ({"facts": [35], "delay": 1, "between": "facts", "unanswerable": 0.5}, "the delay and a question"),
        ({"unanswerable": 1.1}, "unanswerable must be a share, from 0 to 1"),
        ({"unanswerable": -0.1}, "unanswerable must be a share"),
        ({"unanswerable": True}, "unanswerable must be a share"),
        ({"unanswerable": "some"}, "It is 'some'"),
        ({"unanswerable": float("nan")}, "It is nan"),
        ({"unanswerable": 0.3, "episodes": 1}, "too small for a single question"),
    ],
)
def test_options_out_of_range_raise(options, says):
    with pytest.raises(ConfigError, match=says):
        find_task("recall", options)


def test_a_single_number_is_accepted_for_a_list():
    assert find_task("recall", {"facts": 36, "episodes": 2, "delay": 4}).items()[0].group == "36 facts, 4 turns later"

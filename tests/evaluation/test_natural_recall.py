"""Recall of natural facts: histories, questions, held-out words and scoring."""

from __future__ import annotations

import pytest
from data.spoken_facts import IS, PREFERRED, both, question_in, statements_in

from deltamem_tool.data.fact_words import ACKNOWLEDGEMENTS, CORRECTIONS, SMALL_TALK, WORDS, is_held_out
from deltamem_tool.errors import ConfigError
from deltamem_tool.evaluation.scoring.metrics import declines, mentions, mentions_only
from deltamem_tool.evaluation.task import find_task
from deltamem_tool.evaluation.tasks.natural_recall import NaturalRecall
from deltamem_tool.evaluation.tasks.recall import Recall

REMARKS = {remark for remark, _ in SMALL_TALK}
KIND = {**IS, **PREFERRED}


def statements_of(item):
    """The facts that the user states, in order, in all sessions."""
    users = [message["content"] for session in item.history for message in session if message["role"] == "user"]
    return [spoken for text in users if text not in REMARKS for spoken in statements_in(text) or []]


def question_of(item):
    return question_in(item.question[-1]["content"])


def test_an_option_selects_natural_facts():
    natural = find_task("recall", {"words": "natural", "facts": 2, "episodes": 3}, {"seed": 5})
    assert isinstance(natural, NaturalRecall) and natural.metrics == ("contains",)
    assert natural.items() == NaturalRecall(2, 3, seed=5).items() != NaturalRecall(2, 3).items()
    usual = find_task("recall", {"facts": 2, "episodes": 3}, {"seed": 5})
    assert type(usual) is Recall and usual.items() == Recall(2, 3, seed=5).items()


def test_one_fact_is_asked_for_and_its_last_value_is_right():
    for item in NaturalRecall([1, 4], 60).items():
        statements, question = statements_of(item), question_of(item)
        assert len({spoken[:2] for spoken in statements}) == int(item.group.split()[0])
        assert [spoken.value for spoken in statements if spoken[:2] == question[:2]][-1:] == list(item.answers)
        assert sorted(item.others) == sorted(
            {spoken[:2]: spoken.value for spoken in statements if spoken[:2] != question[:2]}.values()
        )
        system = [message for message in item.history[0] if message["role"] == "system"]
        assert list(item.question[:-1]) == system


@pytest.mark.parametrize(
    "held_out", [("attributes", "values", "phrasings"), ("attributes",), "values", ["phrasings"], ()]
)
def test_an_option_selects_the_held_out_words(held_out):
    for item in NaturalRecall(3, 25, held_out=held_out, bare=0.2).items():
        statements, question = statements_of(item), question_of(item)
        for part, texts in {
            "attributes": [spoken.attribute for spoken in (*statements, question)],
            "values": [spoken.value for spoken in statements],
            "phrasings": [spoken.frame for spoken in (*statements, question)],
        }.items():
            assert set(map(is_held_out, texts)) == {part in held_out}, part


@pytest.mark.parametrize(("kind", "corrected"), [("changed", True), ("contradicted", False)])
def test_a_fact_stated_twice_has_an_old_value(kind, corrected):
    task = NaturalRecall(3, 40, kind=kind)
    assert task.metrics == ("contains", "old")
    for item in task.items():
        question = question_of(item)
        old, new = [spoken for spoken in statements_of(item) if spoken[:2] == question[:2]]
        assert statements_of(item)[-1] == new and (item.stale, item.answers) == (old.value, [new.value])
        assert task.score(item, f"It is {new.value}.") == {"contains": 1.0, "old": 0.0}
        assert task.score(item, f"It is {old.value}.") == {"contains": 0.0, "old": 1.0}
        assert task.score(item, f"First {old.value}, then {new.value}.") == {"contains": 0.0, "old": 0.0}
    corrections = set(both(CORRECTIONS))
    assert {statements_of(item)[-1].frame in corrections for item in task.items()} == {corrected}


@pytest.mark.parametrize("between", ["small_talk", "facts"])
def test_the_delay_follows_all_facts(between):
    for item in NaturalRecall(2, 8, delay=[0, 40], between=between, talk=0.0).items():
        delay = int(item.group.split(", ")[1].split()[0])
        users = [message["content"] for message in item.history[0] if message["role"] == "user"]
        later, question = users[len(users) - delay :], question_of(item)
        if between == "small_talk":
            assert set(later) <= REMARKS and len(set(later)) == min(delay, len(REMARKS))
        else:
            others = [spoken for text in later for spoken in statements_in(text)]
            assert len(others) == delay and question[:2] not in {spoken[:2] for spoken in others}
            assert {spoken.value for spoken in others} <= set(item.others)


def test_distractors_of_the_asked_kind_come_first():
    for item in NaturalRecall(1, 30, distractors=2, third_person=0.0).items():
        kind = KIND[question_of(item).attribute]
        attributes = {spoken.attribute for spoken in statements_of(item)}
        assert len(attributes) == 3
        assert sum(KIND[name] is kind for name in attributes) == min(3, len(kind.attributes[True]))


def test_every_session_starts_with_the_system_prompt():
    for item in NaturalRecall(4, 10, session=2, system="Be brief.").items():
        assert all(session[0] == {"role": "system", "content": "Be brief."} for session in item.history)
        assert {len(session) for session in item.history[:-1]} <= {5} and item.question[0]["role"] == "system"
    silent = NaturalRecall(4, 20, system=False).items()
    assert not any(message["role"] == "system" for item in silent for message in item.history[0])


def test_plain_conversations_are_one_message():
    for item in NaturalRecall(3, 10, form="plain", system="").items():
        assert [message["role"] for message in item.history[0]] == ["system", "user"] and len(statements_of(item)) == 3
    words = set(WORDS[True])
    assert all(item.answers[0] in words for item in NaturalRecall(1, 20, form="plain", bare=1).items())


def test_unanswerable_questions_leave_the_others_unchanged():
    plain, some = NaturalRecall(3, 40), NaturalRecall(3, 40, unanswerable=0.25)
    assert some.metrics == ("contains", "false_answer")
    unknown = [item for item in some.items() if not item.is_told]
    assert len(unknown) == 10 and {item.group for item in unknown} == {"3 facts, never told"}
    same = dict(zip([item.id for item in plain.items()], plain.items(), strict=True))
    for item in some.items():
        assert item.history == same[item.id].history
        if item.is_told:
            assert item == same[item.id]
            assert some.score(item, item.answers[0]) == {"contains": 1.0, "false_answer": 0.0}
            assert some.score(item, "You have not told me.") == {"contains": 0.0, "false_answer": 0.0}
            assert some.score(item, item.others[0]) == {"contains": 0.0, "false_answer": 1.0}
        else:
            assert question_of(item)[:2] not in {spoken[:2] for spoken in statements_of(item)}
            assert some.score(item, item.answers[0]) == {"contains": 1.0, "false_answer": 0.0}
            assert some.score(item, "It is Oslo.") == {"contains": 0.0, "false_answer": 1.0}


def test_the_maximum_number_of_facts_are_distinct():
    (item,) = NaturalRecall(64, 1, third_person=0.0, talk=0.0).items()
    assert len({spoken[:2] for spoken in statements_of(item)}) == 64
    assert not any(mentions(item.answers[0], other) or mentions(other, item.answers[0]) for other in item.others)


def test_a_value_is_recognised_only_by_its_words():
    assert mentions("Your gym is the Silver Otter!", "The Silver Otter") and mentions("At 7:45 pm.", "7:45 pm")
    assert not mentions("It is 14:305.", "14:30") and not mentions("Oslofjord", "Oslo") and not mentions("", "Oslo")
    assert mentions_only("Ines Keller", "ines keller", ["Oslo"]) == 1.0
    assert mentions_only("Ines Keller or Oslo", "Ines Keller", ["Oslo"]) == 0.0


@pytest.mark.parametrize(
    ("answer", "is_declined"),
    [
        ("You have not told me who your dentist is.", True),
        ("I don't know what Anna prefers.", True),
        ("I\u2019m not sure.", True),
        ("You haven't mentioned it.", True),
        ("I have no information about that.", True),
        ("Your dentist is Ines Keller.", False),
        ("You told me that your dentist is Ines Keller.", False),
        ("Your favourite novel is The Forgotten Harbour.", False),
        ("", False),
    ],
)
def test_declining_answers_are_recognised(answer, is_declined):
    assert declines(answer) is is_declined


def test_generated_answers_to_stated_facts_do_not_decline():
    for item in NaturalRecall(4, 100).items():
        assert not any(declines(f"Your {spoken.attribute} is {spoken.value}.") for spoken in statements_of(item))
    assert not any(map(declines, ACKNOWLEDGEMENTS))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"words": "nature"}, "no words 'nature'"),
        ({"words": "natural", "fact": 3}, "does not take these options"),
        ({"form": "chat"}, "does not take these options"),
        ({"words": "natural", "held_out": ["names"]}, "no held_out 'names'"),
        ({"words": "natural", "form": "talk"}, "no form 'talk'"),
        ({"words": "natural", "talk": -1}, "talk must be a number, 0 or more"),
        ({"words": "natural", "bare": 2}, "bare must be a share"),
        ({"words": "natural", "third_person": "half"}, "third_person must be a share"),
        ({"words": "natural", "system": 3}, "system must be text, or false"),
        ({"words": "natural", "form": "plain", "delay": 3}, "one message"),
        ({"words": "natural", "held_out": None}, "no held_out None"),
        ({"words": "natural", "facts": 65}, "must be from 1 to 64"),
    ],
)
def test_options_out_of_range_raise(options, says):
    with pytest.raises(ConfigError, match=says):
        find_task("recall", options)

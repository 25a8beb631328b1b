"""The facts and questions of the two conversations."""

from __future__ import annotations

import pytest

from deltamem_tool.data.fact_words import is_held_out
from deltamem_tool.evaluation.tasks.natural_recall import DIALOGUES, NATURAL
from deltamem_tool.quickstart.talk import told_facts


@pytest.mark.parametrize("words", [DIALOGUES, NATURAL])
def test_an_answer_is_right_if_it_names_only_the_stated_value(words):
    facts = told_facts(words, 4)
    assert facts == told_facts(words, 4) != told_facts(words, 4, seed=4)
    for fact in facts:
        assert fact.is_right(fact.truth) and len(fact.others) == 3
        assert not any(fact.is_right(other) for other in fact.others)
        assert not fact.is_right(f"{fact.truth} {fact.others[0]}")


def test_natural_facts_use_held_out_words_and_values():
    for fact in told_facts(NATURAL, 8):
        assert is_held_out(fact.truth) and fact.truth in fact.statement and fact.truth not in fact.question

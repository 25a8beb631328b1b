"""`recipes/own_answers.py` and `own_conversations.py`: what a base says itself, as rows that a training reads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from own_answers import questions, remarks
from own_conversations import turns

from deltamem_tool.data.sources import read_exchanges
from deltamem_tool.evaluation.tasks.agreement import QUESTIONS

RECIPES = Path(__file__).parents[2] / "recipes"


def test_questions_are_different_and_none_that_agreement_asks():
    drawn = questions(500, seed=3)

    assert len(set(drawn)) == 500
    assert not set(drawn) & set(QUESTIONS.read_text(encoding="utf-8").splitlines())
    assert drawn == questions(500, seed=3) != questions(500, seed=4)


def test_remarks_are_seeded():
    assert remarks(20, seed=3) == remarks(20, seed=3) != remarks(20, seed=4)


def test_lines_become_turns():
    text = """Ada: (waving) How was your week, Ben?
    **Ben**: Quiet, I painted the kitchen.
    Ben: It is yellow now.
    They laugh.
    Carl: I was not invited.
    Ada: Yes.
    Ada: I should paint mine as well.
    "Ben": You really should, come on.
    Ada: And what will it be like when"""

    messages = turns(text, "Ada", "Ben")

    assert [message["role"] for message in messages] == ["user", "assistant", "user", "assistant"]
    assert messages[1]["content"] == "Quiet, I painted the kitchen It is yellow now"
    assert messages[2]["content"] == "I should paint mine as well"  # “Yes.” says nothing


def test_what_the_other_says_first_is_left_out():
    messages = turns("Ben: I shall begin with this.\nAda: You have begun already.\nBen: So I have, dear.", "Ada", "Ben")

    assert [message["content"] for message in messages] == ["You have begun already", "So I have, dear"]


@pytest.mark.real_model
@pytest.mark.parametrize("script", ["own_answers", "own_conversations"])
def test_a_training_can_read_the_rows(script, smollm2, tmp_path):
    out = tmp_path / "own.jsonl"
    command = [sys.executable, RECIPES / f"{script}.py", smollm2, out, "--count", "8", "--new-tokens", "60"]

    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    exchanges = read_exchanges(out)
    assert exchanges
    assert f"{len(exchanges)} " in done.stdout
    assert all(messages[-1]["role"] == "assistant" for _, messages in exchanges)

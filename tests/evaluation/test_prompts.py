"""The text in the context before a question, by protocol."""

from __future__ import annotations

from dataclasses import replace

import pytest
from evaluation.asked import item, reading

from deltamem_tool.data import dialogues
from deltamem_tool.errors import ConfigError, DataError
from deltamem_tool.evaluation.conditions import ALL, NOTHING, RETRIEVED, TRUNCATED, WINDOW, EvalProtocol, conditions_of
from deltamem_tool.evaluation.prompts import Views
from deltamem_tool.evaluation.task import Item
from deltamem_tool.segments.template import render

LONG = item(7, sessions=6)
MESSAGES = [message for session in LONG.history for message in session]


def views(tokenizer, protocol="memory"):
    return Views(reading(tokenizer), EvalProtocol.parse(protocol), 6)


def count(tokenizer, text):
    return len(tokenizer(text, add_special_tokens=False).input_ids)


def test_views_of_nothing_and_of_the_whole_history(tokenizer):
    assert views(tokenizer).prompt(LONG, NOTHING) == render(tokenizer, LONG.question, True)
    assert views(tokenizer).prompt(LONG, ALL) == render(tokenizer, [*MESSAGES, *LONG.question], True)


@pytest.mark.parametrize("window", [1, 60, 100, 200, 10_000])
def test_a_window_holds_the_last_messages_that_fit(tokenizer, window):
    prompt = views(tokenizer, f"window:{window}").prompt(LONG, WINDOW)
    room = count(tokenizer, render(tokenizer, LONG.question, True)) + window
    fitting = [
        messages
        for start in range(0, len(MESSAGES) + 1, 2)  # a conversation begins with a message of the user
        if count(tokenizer, render(tokenizer, messages := [*MESSAGES[start:], *LONG.question], True)) <= room
    ]
    assert prompt == render(tokenizer, fitting[0], True) and count(tokenizer, prompt) <= room


def test_bm25_retrieves_messages_about_the_question(tokenizer):
    messages = [
        [dialogues.user(f"My {thing} is {thing}-coloured."), dialogues.assistant("Yes.")] for thing in ("ring", "car")
    ]
    about = Item("a", "a", messages, [dialogues.user("What about the ring?")], ["x"], "all", "here")
    prompt = views(tokenizer).prompt(about, RETRIEVED)
    assert "ring-coloured" in prompt and "car-coloured" not in prompt and prompt.count("<|im_start|>user") <= 1
    nothing = Item("a", "a", messages, [dialogues.user("Zebra?")], ["x"], "all", "here")
    assert views(tokenizer).prompt(nothing, RETRIEVED) == render(tokenizer, nothing.question, True)
    short = views(tokenizer, "window:1").prompt(about, RETRIEVED)
    assert short == render(tokenizer, about.question, True)


def test_contents_that_are_lists_of_texts_are_joined(tokenizer):
    def parts(message):
        half = len(message["content"]) // 2
        cut = message["content"][:half], message["content"][half:]
        return {**message, "content": [{"type": "text", "text": text} for text in cut]}

    history = [[parts(message) for message in session] for session in LONG.history]
    cut = replace(LONG, history=history, question=[parts(message) for message in LONG.question])
    for view in (NOTHING, ALL, RETRIEVED):
        assert views(tokenizer).prompt(cut, view) == views(tokenizer).prompt(LONG, view)


def test_a_prompt_that_cannot_be_rendered_is_named(tokenizer):
    half = replace(LONG, question=[dialogues.user("half \ud83d")])
    with pytest.raises(DataError, match=f"^{LONG.where}: The conversation is not Unicode text"):
        views(tokenizer).prompt(half, NOTHING)


def test_unknown_protocols_raise():
    assert EvalProtocol.parse("window:512").window == 512
    for wrong in ("window", "window:0", "window:-3", "window:1k", "none", ""):
        with pytest.raises(ConfigError, match="no protocol"):
            EvalProtocol.parse(wrong)
    assert [c.name for c in conditions_of(EvalProtocol.parse("full"))][-1] == "no_adapter"  # which sees everything


def test_a_truncated_history_equals_a_window(tokenizer):
    for protocol in ("memory", "window:60", "full"):
        views = Views(reading(tokenizer), EvalProtocol.parse(protocol), 6, truncate=100)
        window = Views(reading(tokenizer), EvalProtocol.parse("window:100"), 6)
        assert views.prompt(LONG, TRUNCATED) == window.prompt(LONG, WINDOW) != views.prompt(LONG, ALL)
    *_, truncated = conditions_of(EvalProtocol.parse("memory"), truncate=100)
    assert (truncated.name, truncated.memory, truncated.view) == ("truncated", None, TRUNCATED)
    assert "within 100 tokens" in truncated.meaning

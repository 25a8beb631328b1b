"""Conversations answered in a batch match those answered alone, and change all together or not at all."""

from __future__ import annotations

from functools import partial

import pytest
from chat.talking import (
    OTHERS,
    TOLERANCE,
    TURNS,
    assert_same_memory,
    assert_unchanged,
    make_engine,
    plain,
    say,
    state_of,
)
from helpers.tiny import tiny_tokenizer

from deltamem_tool.chat.conversation import Conversation, Sampling, generate_together
from deltamem_tool.errors import ConfigError, ExportError


def test_ctrl_c_in_one_prompt_of_a_batch_changes_no_conversation():
    """Each prompt is fed separately after its own context. The second prompt's call is interrupted."""
    engine = make_engine()
    conversations = [Conversation(engine) for _ in range(2)]
    for conversation, other in zip(conversations, OTHERS, strict=False):
        say(conversation, other)
    before, step, calls = [state_of(conversation) for conversation in conversations], engine.step, []

    def interrupted(*inputs):
        calls.append(inputs)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return step(*inputs)

    engine.step = interrupted
    with pytest.raises(KeyboardInterrupt):
        generate_together(conversations, TURNS[:2], Sampling(4))
    for conversation, was in zip(conversations, before, strict=True):
        assert_unchanged(conversation, was)


def test_a_batch_uses_the_whole_room_for_each_row():
    """The engine has room for a fixed number of columns. Padding and finished rows make room for the others."""
    engine = make_engine()
    contents = ("hi", " ".join(TURNS * 3))
    lengths = [len(engine.text.encode(f"<|user|>{content}<|end|><|assistant|>")) for content in contents]
    engine.max_length, step = max(lengths) + 8, engine.step

    def narrow(past, ids, mask, *rest):
        assert mask.shape[1] <= engine.max_length
        return step(past, ids, mask, *rest)

    engine.step = narrow
    together, alone = ([Conversation(engine) for _ in contents] for _ in range(2))
    answers = generate_together(together, contents, Sampling(1000))
    assert [len(answer.tokens) for answer in answers] == [engine.max_length - length for length in lengths]
    assert [answer.why for answer in answers] == ["length", "length"]
    for one, twin, answer, content in zip(together, alone, answers, contents, strict=True):
        assert twin.generate(content, Sampling(1000)).tokens == answer.tokens
        assert one.context == twin.context
        assert_same_memory(one.memory, twin.memory, TOLERANCE)


def test_answers_in_a_batch_match_answers_alone(engine):
    """Prompts differ, contexts have different lengths, and no answer depends on when another one ends."""
    stop = make_engine(frozenset(range(0, len(tiny_tokenizer()), 5)))
    for model in (engine, stop):
        together, alone = ([Conversation(model) for _ in OTHERS] for _ in range(2))
        for conversations in (together, alone):
            say(conversations[0], TURNS[0])
            say(conversations[2], TURNS[1], TURNS[2])
            conversations[2].write = False
        for contents in (OTHERS, TURNS):
            pieces: dict[int, list[str]] = {0: [], 1: [], 2: []}
            tell = partial(lambda pieces, number, piece: pieces[number].append(piece), pieces)
            answers = generate_together(together, contents, Sampling(7), tell)
            expected = [one.generate(content, Sampling(7)) for one, content in zip(alone, contents, strict=True)]
            assert answers == expected
            assert ["".join(pieces[i]) for i in range(3)] == [answer.text for answer in answers]
            for one, other in zip(together, alone, strict=True):
                assert (one.context, one.messages) == (other.context, other.messages)
                assert_same_memory(one.memory, other.memory, TOLERANCE)
        assert [say(one, "and now?") for one in together] == [say(one, "and now?") for one in alone]
        assert together[1].undo() and together[1].undo() and together[1].undo()
        assert together[1].context.tokens == 0
    assert len({len(answer.tokens) for answer in answers}) > 1  # they ended at different times


def test_a_batch_in_a_model_with_sliding_windows_matches_answers_alone():
    model = make_engine(use_sliding_window=True, sliding_window=7, layer_types=["sliding_attention"] * 2)
    together, alone = ([Conversation(model) for _ in OTHERS] for _ in range(2))
    for contents in (OTHERS, TURNS):
        answers = generate_together(together, contents, Sampling(7))
        assert answers == [one.generate(content, Sampling(7)) for one, content in zip(alone, contents, strict=True)]
        for one, other in zip(together, alone, strict=True):
            assert_same_memory(one.memory, other.memory, TOLERANCE)


def test_ctrl_c_in_a_batch_leaves_every_row_unchanged(engine):
    together, alone = ([Conversation(engine) for _ in OTHERS] for _ in range(2))
    calls = []

    def show(number, piece):
        calls.append(number)
        if len(calls) == 5:
            raise KeyboardInterrupt

    for answer, one, other, content in zip(
        generate_together(together, OTHERS, Sampling(9), show), together, alone, OTHERS, strict=True
    ):
        assert answer.why == "interrupted" and 0 < len(answer.tokens) < 9
        say(other, content, tokens=len(answer.tokens))
        assert say(one, TURNS[1]) == say(other, TURNS[1])
        assert_same_memory(one.memory, other.memory, TOLERANCE)


def failing_callback(engine, conversations, monkeypatch):
    def show(number, piece):
        if number == 1:
            raise OSError("no space left")

    return show


def failing_memory(engine, conversations, monkeypatch):
    """Make the engine fail when it reads the second conversation's memory, which is kept for `undo`."""
    whole = engine.memory
    second = conversations[1]._place.past

    def memory(past):
        if past is second:
            raise OSError("no space left")
        return whole(past)

    monkeypatch.setattr(engine, "memory", memory)


def failing_change(engine, conversations, monkeypatch):
    """Make the change of the second conversation fail, after the first one has changed."""

    class Interrupted(Conversation):
        interrupted = False

        def __setattr__(self, name, value):
            if not self.interrupted:
                object.__setattr__(self, "interrupted", True)
                raise KeyboardInterrupt
            object.__setattr__(self, name, value)

    conversations[1].__class__ = Interrupted


@pytest.mark.parametrize("fail", [failing_callback, failing_memory, failing_change])
def test_a_failed_batch_changes_no_conversation(fail, monkeypatch):
    engine = make_engine()
    conversations, twins = ([Conversation(engine) for _ in range(3)] for _ in range(2))
    for group in (conversations, twins):
        generate_together(group, OTHERS, Sampling(4))
    before = [state_of(conversation) for conversation in conversations]
    with monkeypatch.context() as patch:
        show = fail(engine, conversations, patch)
        with pytest.raises((OSError, KeyboardInterrupt)):
            generate_together(conversations, TURNS, Sampling(4), show)
    for conversation, was in zip(conversations, before, strict=True):
        assert_unchanged(conversation, was)
    answers = [generate_together(group, TURNS, Sampling(4)) for group in (conversations, twins)]
    assert answers[0] == answers[1]
    assert [conversation.undo() for conversation in conversations for _ in range(3)] == [True, True, False] * 3


def test_a_batch_with_an_empty_prompt_changes_nothing(engine):
    model = plain(engine)
    conversations = [Conversation(model), Conversation(model)]
    generate_together(conversations, ["one", "two"], Sampling(2))
    before = [state_of(conversation) for conversation in conversations]
    with pytest.raises(ExportError, match="Conversation 2: There is nothing to answer"):
        generate_together(conversations, ["three", ""], Sampling(2))
    for conversation, place in zip(conversations, before, strict=True):
        assert_unchanged(conversation, place)
    with pytest.raises(ExportError, match="Conversation 1: There is nothing to answer"):
        generate_together([Conversation(engine), Conversation(engine)], ["", "hello"])
    for wrong in ([conversations[0]] * 2, [conversations[0], Conversation(engine)], conversations[:1], []):
        with pytest.raises(ConfigError, match="together"):
            generate_together(wrong, ["a", "b"])

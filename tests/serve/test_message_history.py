"""Distinguishing messages that a client resends from new ones."""

from __future__ import annotations

import pytest
from serve.messages import SYSTEM, talk

from deltamem_tool.serve.message_history import MAX_DIGESTS, MAX_KEYS, MessageHistory


def fed(*conversations, pending=0):
    """After requests, each with its answer as the last text."""
    state = MessageHistory.empty()
    for texts in conversations:
        messages = talk(*texts[:-1])
        state = state.with_turn(state.match(messages), messages, texts[-1], pending)
    return state


def new(state, messages):
    """The texts of the new messages."""
    known = state.match(messages)
    return [message["content"] for message, was in zip(messages, known.messages, strict=True) if not was]


FIRST = ("a", "A")
SECOND = ("a", "A", "b", "B")


@pytest.mark.parametrize(
    ("before", "request_", "expected"),
    [
        ([], ("a",), ["a"]),
        ([], ("a", "A", "b"), ["a", "A", "b"]),  # a history from elsewhere
        ([FIRST], ("a", "A", "b"), ["b"]),
        ([FIRST, SECOND], ("a", "A", "b", "B", "c"), ["c"]),
        ([FIRST, SECOND], ("b", "B", "c"), ["c"]),  # the client has dropped the oldest
        ([FIRST], ("b",), ["b"]),  # a client that sends the new message alone
        ([FIRST], ("a",), []),  # a retry
        ([FIRST, SECOND], ("a", "A", "b"), []),
        ([FIRST, SECOND], ("b",), []),  # a retry of a client that drops the oldest
        ([FIRST, SECOND], ("a",), ["a"]),  # stated once more
        ([("a", "A"), ("b", "B")], ("a",), ["a"]),
        ([("a", "A"), ("b", "B")], ("a", "A", "c"), ["c"]),  # two conversations in turn
        ([FIRST, SECOND], ("a", "A", "x"), ["x"]),  # another second message
        ([FIRST], ("a", "other", "b"), ["other", "b"]),  # another answer was taken
        ([FIRST], ("a", "A", "a"), ["a"]),  # the same words again, later
    ],
)
def test_only_unseen_messages_are_new(before, request_, expected):
    assert new(fed(*before), talk(*request_)) == expected


def test_a_key_distinguishes_retries_from_repeated_messages():
    """Covers two clients that say the same in succession, and one that retries after another client's message."""
    state, messages = MessageHistory.empty(), talk("a")
    for key in ("1", "2"):
        known = state.match(messages, key)
        assert not known.is_retry and not any(known.messages)
        state = state.with_turn(known, messages, "A", 0, key)
        assert state.match(messages, key).is_retry
    other = talk("b")
    state = state.with_turn(state.match(other, "3"), other, "B", 0, "3")
    assert MessageHistory.from_json(state.as_json()).match(messages, "1").is_retry
    assert new(state, messages) == ["a"]
    assert not state.match(other, "4").is_retry
    for number in range(MAX_KEYS):
        state = state.with_turn(state.match(other, f"x{number}"), other, "B", 0, f"x{number}")
    assert len(state.keys) == MAX_KEYS and not state.match(messages, "1").is_retry


def test_a_system_message_is_new_once():
    state = MessageHistory.empty()
    messages = talk("a", system=[SYSTEM])
    assert new(state, messages) == ["be brief", "a"]
    state = state.with_turn(state.match(messages), messages, "A", 0)
    assert new(state, talk("b", system=[SYSTEM])) == ["b"]
    assert new(state, talk("a", "A", "b", system=[{**SYSTEM, "content": "be long"}])) == ["be long", "b"]


def test_a_branch_does_not_forget_the_other_one():
    state = fed(FIRST, SECOND, ("a", "A", "x", "X"))
    assert new(state, talk("a", "A", "b", "B", "c")) == ["c"]
    assert new(state, talk("a", "A", "x", "X", "c")) == ["c"]


def test_a_continued_conversation_replaces_its_shorter_history():
    state = fed(FIRST, SECOND)
    assert [len(known.digests) for known in state.talks] == [4]
    known = state.match(talk(*SECOND, "c"))
    assert known.is_latest and known.is_complete and known.talk == 0
    assert not state.match(talk("a", "A", "x")).is_complete


def test_a_history_survives_json():
    state = fed(FIRST, SECOND, ("z", "Z"), pending=1)
    assert MessageHistory.from_json(state.as_json()) == state
    assert MessageHistory.from_json(None).talks == ()


def test_the_history_is_bounded_and_holds_no_text():
    state = MessageHistory.empty()
    for number in range(MAX_DIGESTS):
        messages = talk(f"secret {number}")
        state = state.with_turn(state.match(messages), messages, "OK", 0)
    assert sum(len(known.digests) for known in state.talks) <= MAX_DIGESTS
    assert "secret" not in str(state.as_json())
    other = fed(("a", "A"))
    assert fed(("a", "A")).talks != other.talks  # another salt

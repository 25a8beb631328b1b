"""Conversations in PyTorch with models whose layers keep more than keys and values."""

from __future__ import annotations

import numpy as np
import pytest
from chat.talking import OTHERS, TURNS, assert_same_memory, in_generate, say, state_of
from helpers.hybrids import HYBRIDS, hybrid
from helpers.tiny import tiny_tokenizer

from deltamem_tool.chat.context_window import make_room
from deltamem_tool.chat.conversation import Conversation, Sampling, generate_together
from deltamem_tool.chat.engine import empty_memory
from deltamem_tool.chat.torch_engine import TorchModel

TOLERANCE = 1e-4  # for logits and states: transformers computes several tokens at once differently from single ones
ROUNDS = (TURNS, OTHERS)


@pytest.fixture(scope="module", params=HYBRIDS)
def engine(request) -> TorchModel:
    tokenizer = tiny_tokenizer()
    engine = TorchModel(hybrid(request.param, tokenizer), tokenizer)
    engine.stop_tokens = frozenset()
    return engine


def test_greedy_turns_match_generate(engine):
    conversation = Conversation(engine)
    answers, memory = in_generate(engine, TURNS, 6)
    assert say(conversation, *TURNS) == answers
    for layer, state in conversation.memory.states.items():
        np.testing.assert_allclose(state, memory.layers[layer].numpy(), rtol=0, atol=TOLERANCE)


def test_conversations_in_a_batch_match_each_alone(engine):
    """Prompts have different lengths and answers end at different times, so that texts have padding on both sides."""
    together, alone = ([Conversation(engine) for _ in TURNS] for _ in range(2))
    engine.stop_tokens = frozenset(range(0, len(engine.text.ids), 9))
    try:
        for contents in ROUNDS:
            answers = generate_together(together, contents, Sampling(8))
            expected = [one.generate(content, Sampling(8)) for one, content in zip(alone, contents, strict=True)]
            assert [answer.tokens for answer in answers] == [answer.tokens for answer in expected]
        assert len({len(answer.tokens) for answer in expected}) > 1
    finally:
        engine.stop_tokens = frozenset()
    for one, other in zip(together, alone, strict=True):
        assert_same_memory(one.memory, other.memory, TOLERANCE)


def test_undone_turns_leave_no_trace(engine):
    conversation = Conversation(engine)
    say(conversation, TURNS[0])
    before = state_of(conversation)
    answer = say(conversation, TURNS[1])
    say(conversation, TURNS[2])
    assert conversation.undo() and conversation.undo()
    assert state_of(conversation)[:2] == before[:2]
    assert_same_memory(conversation.memory, before[2])
    assert say(conversation, TURNS[1]) == answer


def test_dropped_turns_are_not_in_the_base_states(engine):
    """The remaining turns are read again from the beginning, without writing."""
    conversation = Conversation(engine)
    say(conversation, *TURNS)
    place = make_room(engine, conversation._place, 48, True, OTHERS[0], Sampling(6))
    assert 0 < len(place.tokens) < len(conversation._place.tokens)
    ids = np.array([place.tokens])
    _, again = engine.step(engine.start(engine.memory(place.past)), ids, np.ones_like(ids), ids < 0)
    next_id, mask = np.array([[7]]), np.ones((1, ids.shape[1] + 1), np.int64)
    expected, actual = (engine.step(past, next_id, mask, next_id < 0)[0] for past in (again, place.past))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["jamba", "zamba"])
def test_several_tokens_continue_from_the_states(name):
    """transformers' Mamba starts from zeros if it gets several tokens."""
    tokenizer = tiny_tokenizer()
    engine = TorchModel(hybrid(name, tokenizer), tokenizer)
    ids = np.arange(10, 19)[None]
    ones, start = np.ones_like(ids), engine.start(empty_memory(engine))
    expected, whole = engine.step(start, ids, ones, ids > 0, all_positions=True)
    first, past = engine.step(start, ids[:, :5], ones[:, :5], ids[:, :5] > 0, all_positions=True)
    second, past = engine.step(past, ids[:, 5:], ones, ids[:, 5:] > 0, all_positions=True)
    np.testing.assert_allclose(np.concatenate([first, second], axis=1), expected, rtol=0, atol=TOLERANCE)
    assert_same_memory(engine.memory(past), engine.memory(whole), TOLERANCE)

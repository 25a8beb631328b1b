"""Prompts answered in one batch, each from its own memory, in either runtime."""

from __future__ import annotations

from copy import copy

import numpy as np
import pytest
from chat.talking import TOLERANCE, TURNS, say

from deltamem_tool.chat.conversation import Conversation
from deltamem_tool.chat.engine import empty_memory
from deltamem_tool.chat.generation import LENGTH, Token, answer_prompts, feed
from deltamem_tool.memory.file import StoredMemory


@pytest.fixture(scope="module")
def memories(engine):
    """The memories of two conversations, one per row."""
    rows = []
    for turn in TURNS[:2]:
        conversation = Conversation(engine)
        say(conversation, turn)
        rows.append(conversation.memory)
    states = {layer: np.concatenate([memory.states[layer] for memory in rows]) for layer in rows[0].states}
    return StoredMemory(states, {}, engine.adapter)


def test_prompts_in_a_batch_are_answered_as_each_alone(engine, memories):
    prompts = [engine.text.encode(f"<|user|>{turn}<|end|><|assistant|>") for turn in TURNS[1:]]
    assert len(prompts[0]) != len(prompts[1])
    together = answer_prompts(engine, memories, prompts, 6)
    for row, (prompt, answer) in enumerate(zip(prompts, together, strict=True)):
        own = StoredMemory({i: state[row : row + 1] for i, state in memories.states.items()}, {}, engine.adapter)
        assert answer_prompts(engine, own, [prompt], 6) == [answer]
        assert len(answer.tokens) == 6 and answer.why == LENGTH
    conversation = Conversation(engine, own, write=False)
    assert conversation.generate(TURNS[2]).tokens[:6] == together[1].tokens


def test_other_answers_continue_after_one_ends(engine, memories):
    prompts = [engine.text.encode(f"<|user|>{turn}<|end|><|assistant|>") for turn in TURNS[:2]]
    short, long = (answer.tokens for answer in answer_prompts(engine, memories, prompts, 12))
    stop = next(token for token in short if token not in long)
    stopping = copy(engine)
    stopping.stop_tokens = frozenset([stop])
    answers = answer_prompts(stopping, memories, prompts, 12)
    assert [answer.stopped for answer in answers] == [True, False]
    assert [answer.tokens for answer in answers] == [short[: short.index(stop) + 1], long]


def test_all_logits_and_last_logits_agree(engine):
    tokens = [Token(token, True) for token in engine.text.encode(TURNS[0])]
    past, mask = engine.start(empty_memory(engine)), np.zeros((1, 0), np.int64)
    last, _, after = feed(engine, past, mask, [tokens])
    every, _, _ = feed(engine, past, mask, [tokens], all_positions=True)
    assert every.shape == (1, len(tokens), last.shape[-1]) and after.shape == (1, len(tokens))
    np.testing.assert_allclose(every[:, -1], last, rtol=0, atol=TOLERANCE)
    shorter, _, _ = feed(engine, past, mask, [tokens[:3]])
    np.testing.assert_allclose(every[:, 2], shorter, rtol=0, atol=TOLERANCE)

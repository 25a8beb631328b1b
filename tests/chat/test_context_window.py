"""When the context's window is full: the oldest turns leave it, and the memory keeps their trace."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from chat.talking import (
    OTHERS,
    SYSTEM,
    TOLERANCE,
    TURNS,
    assert_same_memory,
    assert_unchanged,
    plain,
    say,
    seen,
)

from deltamem_tool import MemoryCache, MemoryState
from deltamem_tool.chat.conversation import Conversation, Sampling
from deltamem_tool.chat.torch_engine import TorchModel
from deltamem_tool.errors import ConfigError


def test_when_the_window_is_full_the_oldest_turns_leave(stopping):
    """The turns that stay are read again, in an empty context and without writing, from the memory as it was."""
    window = 110
    conversation = Conversation(stopping, window=window)
    first = [SYSTEM, {"role": "user", "content": TURNS[0]}]
    conversation.generate(first, Sampling(6))
    answers = [conversation.messages[-1]]
    tokens: list[tuple[int, ...]] = [conversation._place.transcript.turns[-1].tokens]
    while True:
        before = conversation.memory
        calls = recorded(stopping)
        answer = conversation.generate(OTHERS[0], Sampling(6))
        assert conversation.context.tokens <= window
        if conversation.context.dropped:
            break
        assert answer.why == "stop token"  # or what comes after it would still have to be written
        answers.append(conversation.messages[-1])
        tokens.append(answer.tokens[:-1])
    del stopping.step
    dropped, kept = conversation.context.dropped // 2, conversation.context.messages // 2 - 1
    assert dropped + kept == len(answers) and kept > 0
    assert len(conversation.messages) == 1 + 2 * (len(answers) + 1)

    cache = MemoryCache(stopping.model, memory=memory_state(before), write=False)
    ids = stopping.text.encode("<|system|>be brief<|end|>")
    for number in range(dropped, len(answers)):
        end = "" if number == dropped else "<|end|>"
        user = TURNS[0] if number == 0 else OTHERS[0]
        ids += stopping.text.encode(f"{end}<|user|>{user}<|end|><|assistant|>") + list(tokens[number])
    assert len(ids) <= window / 2
    with torch.no_grad():
        stopping.model(torch.tensor([ids]), cache=cache)
        assert_same_memory(before, stored(cache.memory))  # reading does not write
        cache.write = True
        new = stopping.text.encode(f"<|end|><|user|>{OTHERS[0]}<|end|><|assistant|>")
        expected = stopping.model(torch.tensor([new]), cache=cache).logits[0, -1]
    (_, again), (logits, _), *_ = calls
    assert_same_memory(stopping.memory(again), before)
    torch.testing.assert_close(torch.from_numpy(logits[0]), expected, rtol=0, atol=TOLERANCE)


def recorded(engine: TorchModel) -> list:
    """What the calls of the engine give from now on."""
    calls: list = []
    step = type(engine).step

    def record(*inputs):
        calls.append(step(engine, *inputs))
        return calls[-1]

    engine.step = record
    return calls


def memory_state(memory) -> MemoryState:
    return MemoryState({i: torch.from_numpy(state) for i, state in memory.states.items()}, memory.adapter)


def stored(memory: MemoryState):
    from deltamem_tool.memory.file import StoredMemory

    return StoredMemory({i: state.numpy() for i, state in memory.layers.items()}, {}, memory.adapter)


def test_the_last_word_is_written_before_it_leaves(engine):
    """The last token of an answer that ran out of room has not been fed when the next turn comes."""
    conversation, twin = Conversation(engine, window=44), Conversation(engine)
    say(conversation, TURNS[0])
    say(twin, TURNS[0])
    assert_same_memory(conversation.memory, twin.memory)
    calls = recorded(engine)
    say(conversation, OTHERS[2])
    del engine.step
    place = twin._place
    ids = np.array([[token.id for token in place.pending]])
    mask = np.ones((1, len(place.tokens) + 1), np.int64)
    _, past = engine.step(place.past, ids, mask, np.ones((1, 1), bool))
    assert conversation.context.dropped == 2
    assert_same_memory(engine.memory(calls[0][1]), engine.memory(past), TOLERANCE)


def test_undo_brings_back_what_had_left(engine):
    """Of the contexts from before turns left, one is kept: undo goes back to it, and over the turns before it."""
    conversation, places, answers = Conversation(engine, window=80), [], []
    turns = [*TURNS, *OTHERS, *TURNS]
    for turn in turns:
        places.append(seen(conversation))
        answers += say(conversation, turn)
    dropped = [place[0].dropped for place in places] + [conversation.context.dropped]
    left = [number for number in range(len(turns)) if dropped[number + 1] > dropped[number]]
    assert len(left) >= 2
    taken = []
    while conversation.undo():
        taken.append(places.pop())
        assert_unchanged(conversation, taken[-1])
    assert len(taken) == len(turns) - 1 - left[-2]
    assert say(conversation, *turns[-len(taken) :]) == answers[-len(taken) :]


def test_a_prompt_that_is_longer_than_the_window_changes_nothing(engine):
    conversation = Conversation(engine, window=40)
    conversation.generate([SYSTEM, {"role": "user", "content": OTHERS[0]}], Sampling(4))
    before = seen(conversation)
    with pytest.raises(ConfigError, match="longer than the window of 40 tokens"):
        conversation.generate(" ".join(OTHERS), Sampling(4))
    assert_unchanged(conversation, before)
    say(conversation, OTHERS[1])
    with pytest.raises(ConfigError, match="window of 1"):
        Conversation(engine, window=1)


def test_an_answer_ends_where_the_window_does(engine):
    conversation = Conversation(engine, window=40)
    answer = conversation.generate(OTHERS[0], Sampling(1000))
    assert answer.why == "length" and conversation.context.tokens == 40
    assert answer.tokens == say(Conversation(engine), OTHERS[0], tokens=len(answer.tokens))[0]
    say(conversation, OTHERS[1])  # and there is room for another turn


def test_plain_text_goes_through_the_window_too(engine):
    conversation = Conversation(plain(engine), window=30)
    for _ in range(6):
        say(conversation, "one two three ")
    assert conversation.context.dropped > 0 and conversation.context.tokens <= 30
    assert len(conversation.messages) == 12

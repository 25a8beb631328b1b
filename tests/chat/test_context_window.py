"""When the context window is full, the oldest turns are dropped from it and stay in the memory."""

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
    make_engine,
    plain,
    say,
    state_of,
)
from helpers.tiny import randomise, tiny_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel

from deltamem_tool import DeltaMemConfig, MemoryCache, MemoryState, attach
from deltamem_tool.chat.conversation import Conversation, Sampling
from deltamem_tool.chat.engine import empty_memory
from deltamem_tool.chat.generation import answer_prompts
from deltamem_tool.chat.torch_engine import TorchModel
from deltamem_tool.errors import ConfigError, DataError
from deltamem_tool.evaluation.memories import take_rows


def test_a_full_window_drops_the_oldest_turns(stopping_engine):
    """The remaining turns are read again into an empty context, without writing, from the memory before the call."""
    window = 110
    conversation = Conversation(stopping_engine, window=window)
    first = [SYSTEM, {"role": "user", "content": TURNS[0]}]
    conversation.generate(first, Sampling(6))
    answers = [conversation.messages[-1]]
    tokens: list[tuple[int, ...]] = [conversation._place.transcript.turns[-1].tokens]
    while True:
        before = conversation.memory
        calls = recorded(stopping_engine)
        answer = conversation.generate(OTHERS[0], Sampling(6))
        assert conversation.context.tokens <= window
        if conversation.context.dropped:
            break
        assert answer.why == "stop token"  # or the text after it would still have to be written
        answers.append(conversation.messages[-1])
        tokens.append(answer.tokens[:-1])
    del stopping_engine.step
    dropped, remaining = conversation.context.dropped // 2, conversation.context.messages // 2 - 1
    assert dropped + remaining == len(answers) and remaining > 0
    assert len(conversation.messages) == 1 + 2 * (len(answers) + 1)

    cache = MemoryCache(stopping_engine.model, memory=memory_state(before), write=False)
    ids = stopping_engine.text.encode("<|system|>be brief<|end|>")
    for number in range(dropped, len(answers)):
        end = "" if number == dropped else "<|end|>"
        user = TURNS[0] if number == 0 else OTHERS[0]
        ids += stopping_engine.text.encode(f"{end}<|user|>{user}<|end|><|assistant|>") + list(tokens[number])
    assert len(ids) <= window / 2
    with torch.no_grad():
        stopping_engine.model(torch.tensor([ids]), cache=cache)
        assert_same_memory(before, stored(cache.memory))  # reading does not write
        cache.write = True
        new = stopping_engine.text.encode(f"<|end|><|user|>{OTHERS[0]}<|end|><|assistant|>")
        expected = stopping_engine.model(torch.tensor([new]), cache=cache).logits[0, -1]
    (_, again), (logits, _), *_ = calls
    assert_same_memory(stopping_engine.memory(again), before)
    torch.testing.assert_close(torch.from_numpy(logits[0]), expected, rtol=0, atol=TOLERANCE)


def recorded(engine: TorchModel) -> list:
    """A list to which every later call of the engine adds its result."""
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


def test_the_last_token_is_written_before_its_turn_is_dropped(engine):
    """When an answer reaches the end of the window, its last token is fed only with the next turn."""
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


def test_undo_restores_dropped_turns(engine):
    """One context from before turns were dropped is kept, so undo goes back to it and through the turns before it."""
    conversation, places, answers = Conversation(engine, window=80), [], []
    turns = [*TURNS, *OTHERS, *TURNS]
    for turn in turns:
        places.append(state_of(conversation))
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
    before = state_of(conversation)
    with pytest.raises(ConfigError, match="longer than the window of 40 tokens"):
        conversation.generate(" ".join(OTHERS), Sampling(4))
    assert_unchanged(conversation, before)
    say(conversation, OTHERS[1])
    with pytest.raises(ConfigError, match="window of 1"):
        Conversation(engine, window=1)


def test_an_answer_ends_at_the_end_of_the_window(engine):
    conversation = Conversation(engine, window=40)
    answer = conversation.generate(OTHERS[0], Sampling(1000))
    assert answer.why == "length" and conversation.context.tokens == 40
    assert answer.tokens == say(Conversation(engine), OTHERS[0], tokens=len(answer.tokens))[0]
    say(conversation, OTHERS[1])  # and there is room for another turn


def test_plain_text_is_dropped_from_the_window_too(engine):
    conversation = Conversation(plain(engine), window=30)
    for _ in range(6):
        say(conversation, "one two three ")
    assert conversation.context.dropped > 0 and conversation.context.tokens <= 30
    assert len(conversation.messages) == 12


def learned(positions: int) -> TorchModel:
    """A GPT-2, whose positions are a table of limited length."""
    tokenizer = tiny_tokenizer()
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": len(tokenizer), "n_positions": positions}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=1, pad_token_id=0)).eval()
    randomise(attach(model, DeltaMemConfig(rank=4)))
    return TorchModel(model, tokenizer)


@pytest.mark.parametrize("make", [learned, lambda positions: make_engine(max_position_embeddings=positions)])
def test_the_window_is_limited_by_the_positions_of_the_model(make):
    positions = 64
    engine = make(positions)
    conversation, limited = Conversation(engine), Conversation(engine, window=positions)
    assert say(conversation, *TURNS[:1] * 6, tokens=4) == say(limited, *TURNS[:1] * 6, tokens=4)
    assert conversation.context == limited.context
    assert limited.context.window == positions >= limited.context.tokens and limited.context.dropped
    with pytest.raises(ConfigError, match="at most 64"):
        Conversation(engine, window=positions + 1)
    before = state_of(conversation)
    with pytest.raises(ConfigError, match="longer than the window of 64 tokens"):
        conversation.generate("my cat is Bella. " * 50)
    assert_unchanged(conversation, before)


def test_answers_to_prompts_end_at_the_last_position():
    engine = learned(40)
    prompts = [engine.text.encode("hello there"), engine.text.encode("my cat is Bella")]
    answers = answer_prompts(engine, take_rows(empty_memory(engine), [0, 0]), prompts, 100)
    assert [len(prompt) + len(answer.tokens) for prompt, answer in zip(prompts, answers, strict=True)] == [40, 40]


def test_a_token_unknown_to_the_model_is_named():
    """A tokenizer with more tokens than the model has embeddings."""
    engine, tokenizer = make_engine(), tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    engine = TorchModel(engine.model, tokenizer)
    conversation = Conversation(engine)
    say(conversation, TURNS[0])
    before = state_of(conversation)
    with pytest.raises(DataError, match=r"does not know: '\[PAD\]'"):
        conversation.generate("my dog is [PAD]")
    assert_unchanged(conversation, before)
    say(conversation, TURNS[1])

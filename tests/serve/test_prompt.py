"""The prompt of a request: all tokens of the conversation, of which only the new ones write."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.tiny import randomise, tiny_model, tiny_tokenizer
from serve.messages import SYSTEM, talk

from deltamem_tool import DeltaMemConfig, TorchModel, attach
from deltamem_tool.chat.engine import empty_memory
from deltamem_tool.chat.generation import Token
from deltamem_tool.memory.file import StoredMemory
from deltamem_tool.segments.encode import tag_chat
from deltamem_tool.segments.tags import SegmentTag
from deltamem_tool.serve.errors import RequestError
from deltamem_tool.serve.message_history import MessageHistory
from deltamem_tool.serve.prompt import PromptRequest, build_prompt

GRANULARITIES = ("token", "message", "sentence")


def make_engine(granularity):
    tokenizer = tiny_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer))
    coupled = granularity == "token"
    randomise(attach(model, DeltaMemConfig(rank=4, state_heads=2, granularity=granularity, couple_lambda=coupled)))
    return TorchModel(model, tokenizer)


@pytest.fixture(scope="module", params=GRANULARITIES)
def engine(request):
    return make_engine(request.param)


@pytest.fixture(scope="module")
def token_engine():
    return make_engine("token")


def fed_with(*conversations, pending=0):
    state = MessageHistory.empty()
    for *messages, answer in conversations:
        state = state.with_turn(state.match(messages), messages, answer["content"], pending)
    return state


def prompt_of(engine, fed, messages, memory=None, write=True, window=None, tokens=4):
    known = fed.match(messages)
    pending = 0 if known.talk is None else fed.talks[known.talk].pending
    request = PromptRequest(messages, known, pending, write, tokens)
    return build_prompt(engine, memory or open_memory(engine), request, window)


def open_memory(engine):
    """A memory with an open segment of some tokens, if the engine writes by segments."""
    empty = empty_memory(engine)
    segments = {layer: segment + 1 for layer, segment in empty.open_segments.items()}
    return StoredMemory(empty.states, segments, empty.adapter)


def is_open(memory):
    return any(segment.any() for segment in memory.open_segments.values())


def expected(engine, messages, known):
    """All tokens with their tags; those after the first `known` characters of the rendered messages write."""
    tokenizer, granularity = tiny_tokenizer(), engine.mechanism.granularity
    text = engine.text.render(messages)
    start = len(tokenizer(text[:known], add_special_tokens=False).input_ids)
    if granularity == "token":
        ids = tokenizer(text, add_special_tokens=False).input_ids
        return tuple(Token(token, number >= start) for number, token in enumerate(ids))
    chat = tag_chat(tokenizer, messages, granularity, add_generation_prompt=True)
    return tuple(
        Token(
            token,
            number >= start and tag != SegmentTag.OUTSIDE,
            number >= start and tag == SegmentTag.LAST,
        )
        for number, (token, tag) in enumerate(zip(chat.input_ids, chat.tags, strict=True))
    )


def end_of(engine, messages, content):
    """The position in the rendered messages at which `content` ends."""
    return engine.text.render(messages).index(content) + len(content)


@pytest.mark.parametrize("system", [(), (SYSTEM,)])
def test_all_of_a_new_conversation_writes(engine, system):
    messages = talk("my cat is Bella. hello there", "yes", "thank you", system=system)
    prompt = prompt_of(engine, MessageHistory.empty(), messages)
    assert prompt.tokens == expected(engine, messages, 0)
    assert prompt.answer_writes and prompt.written == len(messages) and not is_open(prompt.memory)


@pytest.mark.parametrize("system", [(), (SYSTEM,)])
def test_messages_after_the_last_answer_write(engine, system):
    messages = talk("my cat is Bella", "yes", "thank you", "no", "hello there. my dog is Max", system=system)
    prompt = prompt_of(engine, fed_with(messages[:-3], messages[:-1]), messages)
    assert prompt.tokens == expected(engine, messages, end_of(engine, messages, "no"))
    assert prompt.written == 1 and is_open(prompt.memory) == bool(engine.memory_shape.segment_width)


def test_the_open_segment_of_another_conversation_ends_first(engine):
    messages = talk("my cat is Bella", "yes", "thank you")
    prompt = prompt_of(engine, fed_with(messages[:-1], talk("hello there", "no")), messages)
    assert prompt.tokens == expected(engine, messages, end_of(engine, messages, "yes"))
    assert prompt.written == 1 and not is_open(prompt.memory)


def test_an_unknown_history_writes_except_for_its_known_prefix(engine):
    messages = talk("my cat is Bella", "yes", "hello there", "no", "thank you")
    prompt = prompt_of(engine, fed_with(messages[:2]), messages)
    assert prompt.tokens == expected(engine, messages, end_of(engine, messages, "yes"))
    assert prompt.written == 3


@pytest.mark.parametrize("messages", [talk("my cat is Bella"), talk("my cat is Bella", "yes", "thank you")])
def test_nothing_of_a_repeated_request_writes(engine, messages):
    memory = open_memory(engine)
    prompt = prompt_of(
        engine, fed_with(talk("my cat is Bella", "yes"), [*messages, *talk("", "no")[1:]]), messages, memory
    )
    assert not any(token.writes or token.ends for token in prompt.tokens)
    assert [token.id for token in prompt.tokens] == [token.id for token in expected(engine, messages, 0)]
    assert not prompt.answer_writes and prompt.written == 0 and prompt.memory is memory


def test_nothing_of_a_read_only_request_writes(engine):
    memory, messages = open_memory(engine), talk("my cat is Bella")
    prompt = prompt_of(engine, MessageHistory.empty(), messages, memory, write=False)
    assert not any(token.writes or token.ends for token in prompt.tokens)
    assert not prompt.answer_writes and prompt.written == 0 and prompt.memory is memory


def test_a_known_message_before_a_new_one_does_not_write(engine):
    """Covers one known turn, and a client that sends each message alone after the same system message."""
    before = talk("my cat is Bella", "yes", system=[SYSTEM])
    for messages in (talk("thank you", system=[SYSTEM]), [*before[:2], *talk("thank you")]):
        prompt = prompt_of(engine, fed_with(before), messages)
        known = end_of(engine, messages, messages[-2]["content"]) + len("<|end|>")
        assert prompt.tokens == expected(engine, messages, known) and prompt.written == 1


def test_the_last_unfed_token_of_an_answer_writes(engine):
    messages = talk("my cat is Bella", "yes thank you", "hello there")
    prompt = prompt_of(engine, fed_with(messages[:2], pending=1), messages)
    whole = expected(engine, messages, end_of(engine, messages, "yes thank you"))
    writing = [token.writes for token in prompt.tokens]
    first = writing.index(True)
    assert [token.id for token in prompt.tokens] == [token.id for token in whole]
    assert first == [token.writes for token in whole].index(True) - 1
    assert prompt.tokens[first].id == engine.text.encode("yes thank you")[-1]


def test_known_turns_are_dropped_from_a_full_window(token_engine):
    turns = [text for n in range(6) for text in (f"my cat is Bella {'yes ' * n}", "no")]
    messages = talk(*turns, "thank you", system=[SYSTEM])
    fed = fed_with(messages[:-1])
    whole = len(prompt_of(token_engine, fed, messages).tokens)
    seen = set()
    for window in range(whole + 5, 20, -7):
        prompt = prompt_of(token_engine, fed, messages, window=window)
        remaining = [SYSTEM, *messages[1 + prompt.dropped :]]
        assert [token.id for token in prompt.tokens] == [token.id for token in expected(token_engine, remaining, 0)]
        assert len(prompt.tokens) + prompt.room == window and prompt.room >= 4
        assert prompt.written == 1 and prompt.tokens[-1].writes and not prompt.tokens[0].writes
        if prompt.dropped:  # and no more than necessary
            more = [SYSTEM, *messages[1 + prompt.dropped - 2 :]]
            assert len(expected(token_engine, more, 0)) + 4 > window
        seen.add(prompt.dropped)
    assert {0, 12} <= seen


def test_new_messages_must_fit_into_the_window(token_engine):
    with pytest.raises(RequestError, match="maximum context length is 8 tokens") as refused:
        prompt_of(token_engine, MessageHistory.empty(), talk("my cat is Bella and my dog is Max"), window=8)
    assert refused.value.code == "context_length_exceeded"


def test_a_segment_that_ends_is_written_before_the_prompt():
    """The state before the prompt includes the segment that ends."""
    engine = make_engine("message")
    memory = open_memory(engine)
    prompt = prompt_of(engine, MessageHistory.empty(), talk("thank you"), memory)
    ended = memory.end_segment(engine.mechanism)
    for layer, state in ended.states.items():
        np.testing.assert_array_equal(prompt.memory.states[layer], state)

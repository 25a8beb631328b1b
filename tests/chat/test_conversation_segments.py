"""Conversations whose memory writes by segment reach the same states as tagged messages in PyTorch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.greedy import continue_greedily
from helpers.tiny import PAD, randomise, tiny_model, tiny_tokenizer

from deltamem_tool import DeltaMemConfig, MemoryCache, MemoryState, attach
from deltamem_tool.chat.conversation import Conversation, Sampling, generate_together
from deltamem_tool.chat.torch_engine import TorchModel
from deltamem_tool.errors import ConfigError
from deltamem_tool.segments.encode import tag_chat

TOLERANCE = 1e-5
NEW = 5  # tokens of an answer
SYSTEM = {"role": "system", "content": "be brief"}
TURNS = ("my cat is Bella. my dog is Max.", "what is the name of my cat?", "thank you")


def make_engine(granularity: str = "message", template: str | None = None) -> TorchModel:
    tokenizer = tiny_tokenizer()
    if template is not None:
        tokenizer.chat_template = template
    model = tiny_model(vocab_size=len(tokenizer))
    options = {"granularity": granularity, "couple_lambda": False}
    randomise(attach(model, DeltaMemConfig(rank=4, state_heads=2, branches=("q", "v", "o"), **options)))
    engine = TorchModel(model, tokenizer)
    engine.stop_tokens = frozenset()
    return engine


@pytest.fixture(scope="module", params=["message", "sentence"])
def engine(request):
    return make_engine(request.param)


@pytest.fixture(scope="module")
def message_engine():
    return make_engine()


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def in_generate(engine: TorchModel, turns, memory: MemoryState | None = None):
    """Each turn's tokens, by `model.generate` with the tags of the whole conversation; and the cache. An answer's own
    text is beside the point: what is new at a turn are the last tokens of the rendering."""
    tokenizer, granularity = tiny_tokenizer(), engine.mechanism.granularity
    cache = MemoryCache(engine.model, memory)
    if memory is not None and bool((memory.open_tokens > 0).any()):
        cache.end_segment()
    ids, answers, messages = torch.zeros(1, 0, dtype=torch.long), [], []
    for number, turn in enumerate(turns):
        before = tokenizer.apply_chat_template(messages, tokenize=False) if messages else ""
        messages = [*messages, *turn]
        tagged = tag_chat(tokenizer, messages, granularity, add_generation_prompt=True)
        tail = "<|end|>" if number else ""
        new = len(tokenizer(tail + tagged.text[len(before) :])["input_ids"])
        pending = [1] if number else []  # the last token generated: it belongs to the segment that is open
        cache.segment_tags = torch.tensor([pending + tagged.tags[-new:]], dtype=torch.int8)
        ids = torch.cat([ids, torch.tensor([tagged.input_ids[-new:]])], dim=1)
        prompt = ids.shape[1]
        ids = continue_greedily(engine.model, ids, cache, NEW, PAD)
        answers.append(tuple(ids[0, prompt:].tolist()))
        messages = [*messages, {"role": "assistant", "content": "x"}]
    return answers, cache


def talk(conversation: Conversation, turns):
    return [conversation.generate(turn, Sampling(NEW)).tokens for turn in turns]


def assert_close(memory, expected: MemoryState) -> None:
    for layer, state in memory.states.items():
        torch.testing.assert_close(torch.from_numpy(state), expected.layers[layer], rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(
            torch.from_numpy(memory.open_segments[layer]), expected.open_segments[layer], rtol=0, atol=TOLERANCE
        )


def test_messages_are_tagged_as_in_pytorch(engine):
    turns = [[SYSTEM, user(TURNS[0])], [user(TURNS[1])], [user(TURNS[2])]]
    conversation = Conversation(engine)
    expected, cache = in_generate(engine, turns)
    assert talk(conversation, turns) == expected
    assert_close(conversation.memory, cache.memory)
    assert any(state.any() for state in conversation.memory.states.values())
    # The answer's segment is open: its header and all of it that was fed.
    assert {segment[0, -1] for segment in conversation.memory.open_segments.values()} == {1 + NEW - 1}


def test_a_system_message_writes_nothing(engine):
    conversation = Conversation(engine)
    conversation.generate([SYSTEM, user("a")], Sampling(1))
    other = Conversation(engine)
    other.generate([user("a")], Sampling(1))
    assert {int(segment[0, -1]) for segment in conversation.memory.open_segments.values()} == {1}  # the prompt's header
    assert {int(segment[0, -1]) for segment in other.memory.open_segments.values()} == {1}


def test_an_open_segment_of_another_conversation_is_written_first(message_engine, tmp_path):
    first = Conversation(message_engine)
    talk(first, [[user(TURNS[0])]])
    first.save_memory(tmp_path / "memory")
    memory = MemoryState.load(tmp_path / "memory")
    assert memory.open_tokens.tolist() == [NEW]
    for start in (Conversation(message_engine, first.memory), Conversation(message_engine)):
        start.load_memory(tmp_path / "memory")
        assert_close(start.memory, memory)  # not before something is said
        expected, cache = in_generate(message_engine, [[user(TURNS[1])]], memory)
        assert talk(start, [[user(TURNS[1])]]) == expected
        assert_close(start.memory, cache.memory)
    reading = Conversation(message_engine, first.memory, write=False)
    talk(reading, [[user(TURNS[1])]])
    assert_close(reading.memory, memory)


@pytest.mark.parametrize("window", [None, 48], ids=["", "turns leave"])
def test_a_loaded_open_segment_is_never_mixed_with_new_messages(window, tmp_path):
    """It is written before the next token is fed, whatever was said before and even if turns leave the context."""
    engine = make_engine()
    other = Conversation(engine)
    talk(other, [[user(TURNS[0])]])
    other.save_memory(tmp_path / "memory")
    opened = MemoryState.load(tmp_path / "memory")
    cache = MemoryCache(engine.model, opened)
    cache.end_segment()
    conversation = Conversation(engine, window=window)
    talk(conversation, [[user(TURNS[1])], [user(TURNS[2])]])
    conversation.load_memory(tmp_path / "memory")
    step, fed = engine.step, []

    def watched(past, *inputs):
        fed.append(engine.memory(past))
        return step(past, *inputs)

    engine.step = watched
    conversation.generate([user(" ".join(TURNS[1:]))], Sampling(NEW))
    assert len(conversation.messages) == 6 and (conversation.context.dropped > 0) == (window is not None)
    assert_close(fed[0], cache.memory)


def test_undo_reopens_the_segment(message_engine):
    conversation = Conversation(message_engine)
    talk(conversation, [[user(TURNS[0])]])
    before = conversation.memory
    answers = talk(conversation, [[user(TURNS[1])]])
    assert conversation.undo()
    for layer, segment in conversation.memory.open_segments.items():
        assert np.array_equal(segment, before.open_segments[layer]) and segment[0, -1] == NEW
    assert talk(conversation, [[user(TURNS[1])]]) == answers


def test_a_template_without_a_tail_ends_a_message_with_its_last_token():
    template = (
        "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    engine = make_engine(template=template)
    conversation = Conversation(engine)
    (answer,) = talk(conversation, [[user("one")]])
    talk(conversation, [[user("two")]])
    encode = engine.text.encode
    ids = [*encode("<|user|>one<|assistant|>"), *answer, *encode("<|user|>two<|assistant|>")]
    ids += conversation._place.transcript.turns[-1].tokens[:-1]
    one, two = len(encode("<|user|>one")), len(encode("<|user|>two"))
    tags = [1] * (one - 1) + [2] + [1] * NEW + [2] + [1] * (two - 1) + [2] + [1] * NEW
    cache = MemoryCache(engine.model)
    cache.segment_tags = torch.tensor([tags], dtype=torch.int8)
    with torch.no_grad():
        engine.model(torch.tensor([ids]), cache=cache)
    assert_close(conversation.memory, cache.memory)


def test_a_batch_with_segments_matches_its_rows(message_engine):
    together, alone = ([Conversation(message_engine) for _ in TURNS] for _ in range(2))
    for contents in (TURNS, TURNS[::-1]):
        answers = generate_together(together, contents, Sampling(NEW))
        assert answers == [one.generate(text, Sampling(NEW)) for one, text in zip(alone, contents, strict=True)]
        for one, other in zip(together, alone, strict=True):
            other_state = message_engine._on_devices(other.memory)
            assert_close(one.memory, other_state)


@pytest.mark.parametrize("stays", [True, False])
def test_turns_are_written_before_they_leave_the_window(message_engine, stays):
    """If the last answer leaves the window with the rest, its segment ends there; otherwise the template ends it."""
    encode, conversation = message_engine.text.encode, Conversation(message_engine)
    talk(conversation, [[user(text)] for text in ((TURNS[0], TURNS[2]) if stays else TURNS[:1])])
    last = conversation._place.transcript.turns[-1].tokens
    before, context = conversation._place, conversation.context.tokens
    conversation.window = context + 5
    talk(conversation, [[user(TURNS[2])]])
    assert conversation.context.dropped == 2 and conversation.context.messages == (4 if stays else 2)

    # The last token joins the open segment in the context in which it was generated.
    on, mask = np.ones((1, 1), bool), np.ones((1, context), np.int64)
    _, past = message_engine.step(before.past, np.array([[last[-1]]]), mask, on, ~on)
    cache = MemoryCache(message_engine.model, past.memory, write=False)
    new = encode(f"<|user|>{TURNS[2]}<|end|><|assistant|>")
    answer = conversation._place.transcript.turns[-1].tokens
    tags = [1] * (len(new) - 2) + [2] + [1] * NEW
    with torch.no_grad():
        if stays:
            message_engine.model(torch.tensor([[*new, *last]]), cache=cache)
            new, tags = [*encode("<|end|>"), *new], [2, *tags]
        else:
            cache.end_segment()
        cache.write, cache.segment_tags = True, torch.tensor([tags], dtype=torch.int8)
        message_engine.model(torch.tensor([[*new, *answer[:-1]]]), cache=cache)
    assert_close(conversation.memory, cache.memory)


def test_writing_by_segment_without_a_template_raises(message_engine):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="writes by message"):
        Conversation(TorchModel(message_engine.model, tokenizer))

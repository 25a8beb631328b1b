"""Conversations over PyTorch: turns as `generate` makes them, and everything that can happen between and within them.

The same code runs over ONNX Runtime: tests/onnx/test_runtime.py compares the two.
"""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch
from tiny import PAD, randomise, tiny_model, tiny_tokenizer

from deltamem_tool import DeltaMemConfig, MemoryCache, MemoryState, attach
from deltamem_tool.chat.conversation import Context, Conversation, Sampling, generate_together
from deltamem_tool.chat.generation import Said
from deltamem_tool.chat.torch_runtime import TorchModel
from deltamem_tool.errors import ConfigError, DataError, ExportError, MemoryStateError

TOLERANCE = 1e-5  # of logits and states
TURNS = ("my cat is Bella", "what is the name of my cat?", "thank you")
SYSTEM = {"role": "system", "content": "be brief"}
OTHERS = ("hello there", "no", "the name of my dog is Max, and that of my cat is Tom")


def make_engine(stop_tokens: frozenset[int] = frozenset(), name: str = "qwen3", **changes) -> TorchModel:
    tokenizer = tiny_tokenizer()
    model = tiny_model(name, vocab_size=len(tokenizer), **changes)
    randomise(attach(model, DeltaMemConfig(rank=4, state_heads=2, heads=("q", "v", "o"))))
    engine = TorchModel(model, tokenizer)
    engine.stop_tokens = stop_tokens
    return engine


@pytest.fixture(scope="module")
def engine():
    return make_engine()


@pytest.fixture(scope="module")
def stopping(engine):
    """Nearly every other token ends an answer, so that hardly one ends by its length."""
    return make_engine(frozenset(range(2, len(tiny_tokenizer()), 2)))


def say(conversation: Conversation, *contents, tokens: int = 6, **options) -> list[tuple[int, ...]]:
    return [conversation.generate(content, Sampling(tokens, **options)).tokens for content in contents]


def assert_same_memory(found, expected, tolerance: float = 0.0) -> None:
    assert found.states.keys() == expected.states.keys() and found.adapter == expected.adapter
    for layer, state in found.states.items():
        np.testing.assert_allclose(state, expected.states[layer], rtol=0, atol=tolerance)


def seen(conversation: Conversation):
    return conversation.context, conversation.messages, conversation.memory


def assert_unchanged(conversation: Conversation, before) -> None:
    context, messages, memory = before
    assert conversation.context == context and conversation.messages == messages
    assert_same_memory(conversation.memory, memory)


def in_generate(engine: TorchModel, turns, new_tokens: int):
    """Tokens of each answer and the memory, by `model.generate` on one cache."""
    cache, ids, answers = MemoryCache(engine.model), torch.zeros(1, 0, dtype=torch.long), []
    for turn in turns:
        text = ("<|end|>" if answers else "") + f"<|user|>{turn}<|end|><|assistant|>"
        new = torch.tensor([engine.text.encode(text)])
        ids = torch.cat([ids, new], dim=1)
        prompt = ids.shape[1]
        ids = engine.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=PAD,
        )
        answers.append(tuple(ids[0, prompt:].tolist()))
    return answers, cache.memory


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"name": "smollm3"},
        {"use_sliding_window": True, "sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]},
    ],
    ids=["qwen3", "smollm3", "a window in a layer"],
)
def test_greedy_turns_are_those_of_generate(changes):
    engine = make_engine(**changes)
    conversation = Conversation(engine)
    expected, memory = in_generate(engine, TURNS, 6)
    assert say(conversation, *TURNS) == expected
    for layer, state in conversation.memory.states.items():
        torch.testing.assert_close(torch.from_numpy(state), memory.layers[layer], rtol=0, atol=TOLERANCE)


def test_it_needs_neither_torch_nor_onnx_runtime():
    code = "import sys, deltamem_tool.chat.conversation; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert not {"torch", "transformers", "onnxruntime"} & set(done.stdout.split())


def test_the_context_and_the_messages_are_told(engine):
    conversation = Conversation(engine, window=400)
    assert conversation.context == Context(0, 400, 0, 0) and conversation.messages == []
    answer = conversation.generate([SYSTEM, {"role": "user", "content": TURNS[0]}], Sampling(3))
    prompt = len(engine.text.encode(f"<|system|>be brief<|end|><|user|>{TURNS[0]}<|end|><|assistant|>"))
    assert conversation.context == Context(prompt + 3, 400, 3, 0)
    assert conversation.messages == [
        SYSTEM,
        {"role": "user", "content": TURNS[0]},
        {"role": "assistant", "content": answer.text},
    ]


def test_undo_takes_turns_back_one_by_one(engine):
    conversation, places = Conversation(engine), []
    for turn in TURNS:
        places.append(seen(conversation))
        say(conversation, turn)
    for turn, place in zip(reversed(TURNS), reversed(places), strict=True):
        answer = conversation.messages[-1]
        assert conversation.undo()
        assert_unchanged(conversation, place)
        say(conversation, turn)  # the same again, from the same place
        assert conversation.messages[-1] == answer
        assert conversation.undo()
    assert not conversation.undo()
    assert conversation.context.tokens == 0 and conversation.messages == []


def test_what_is_said_after_undo_is_as_if_nothing_had_been(engine):
    straight, back = Conversation(engine), Conversation(engine)
    say(straight, TURNS[0])
    say(back, TURNS[0], OTHERS[0], OTHERS[2])
    assert back.undo() and back.undo()
    assert say(back, TURNS[1]) == say(straight, TURNS[1])
    assert_same_memory(back.memory, straight.memory)


def test_forget_is_a_new_conversation(engine):
    conversation = Conversation(engine)
    say(conversation, *TURNS)
    conversation.forget()
    assert not any(state.any() for state in conversation.memory.states.values())
    assert conversation.context.tokens == 0 and conversation.messages == [] and not conversation.undo()
    assert say(conversation, OTHERS[0]) == say(Conversation(engine), OTHERS[0])


def test_a_memory_is_loaded_and_the_context_stays(engine, tmp_path):
    other, conversation = Conversation(engine), Conversation(engine)
    say(other, OTHERS[2])
    other.save_memory(tmp_path / "memory")
    say(conversation, TURNS[0])
    context, messages, _ = seen(conversation)
    conversation.load_memory(tmp_path / "memory")
    assert (conversation.context, conversation.messages) == (context, messages)
    assert_same_memory(conversation.memory, other.memory)

    # A memory that is not this adapter's, or not there: nothing changes.
    before = seen(conversation)
    MemoryState({i: torch.zeros(1, 2, 4, 4) for i in (0, 1)}, "another").save(tmp_path / "another")
    with pytest.raises(MemoryStateError, match="another adapter"):
        conversation.load_memory(tmp_path / "another")
    with pytest.raises(MemoryStateError, match="no memory file"):
        conversation.load_memory(tmp_path / "nowhere")
    assert_unchanged(conversation, before)
    # The turn before the file came can still be taken back.
    assert conversation.undo()
    assert not any(state.any() for state in conversation.memory.states.values())


def test_ctrl_c_while_text_is_shown_keeps_what_was_said(engine):
    conversation, pieces = Conversation(engine), []

    def show(piece):
        pieces.append(piece)
        if len(pieces) == 3:
            raise KeyboardInterrupt

    say(conversation, TURNS[0])
    answer = conversation.generate(TURNS[1], Sampling(12), show)
    assert answer.why == "interrupted" and not answer.stopped and 3 <= len(answer.tokens) < 12
    assert answer.text == "".join(pieces) and conversation.messages[-1]["content"] == answer.text
    # It goes on as one whose answer had to be that long does.
    twin = Conversation(engine)
    assert say(twin, TURNS[0], TURNS[1], tokens=6)[0] and twin.undo()
    say(twin, TURNS[1], tokens=len(answer.tokens))
    assert_unchanged(conversation, seen(twin))
    assert say(conversation, TURNS[2]) == say(twin, TURNS[2])


@pytest.mark.parametrize("call", [1, 2, 4])
@pytest.mark.parametrize("after", [False, True], ids=["before the call", "after the call"])
def test_ctrl_c_between_tokens_leaves_a_conversation_that_goes_on(call, after):
    """In the call over the prompt, too: then nothing was said, and nothing has changed."""
    engine, twin_engine = make_engine(), make_engine()
    step, calls = engine.step, []

    def interrupted(*inputs):
        calls.append(inputs)
        if len(calls) == call and not after:
            raise KeyboardInterrupt
        result = step(*inputs)
        if len(calls) == call:
            raise KeyboardInterrupt
        return result

    engine.step = interrupted
    conversation, twin = Conversation(engine), Conversation(twin_engine)
    if call == 1:
        before = seen(conversation)
        with pytest.raises(KeyboardInterrupt):
            conversation.generate(TURNS[0], Sampling(8))
        assert_unchanged(conversation, before)
    else:
        answer = conversation.generate(TURNS[0], Sampling(8))
        assert answer.why == "interrupted" and len(answer.tokens) == call - 1
        say(twin, TURNS[0], tokens=call - 1)
        assert_unchanged(conversation, seen(twin))
    engine.step = step
    assert say(conversation, TURNS[1]) == say(twin, TURNS[1])
    assert_same_memory(conversation.memory, twin.memory, TOLERANCE)


def test_ctrl_c_in_one_prompt_of_a_batch_changes_no_conversation():
    """Prompts go in one by one after contexts of their own: the second one's call is interrupted."""
    engine = make_engine()
    conversations = [Conversation(engine) for _ in range(2)]
    for conversation, other in zip(conversations, OTHERS, strict=False):
        say(conversation, other)
    before, step, calls = [seen(conversation) for conversation in conversations], engine.step, []

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


def test_a_batch_has_room_for_each_of_its_rows():
    """An engine with room for so many columns and no more: padding and ended rows make way for those still going."""
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


def test_what_stands_for_answers_is_no_prompt(engine):
    conversation = Conversation(engine)
    before = seen(conversation)
    with pytest.raises(ExportError, match=r"U\+E000"):
        conversation.generate("a \ue0000\ue000 b", Sampling(1))
    assert_unchanged(conversation, before)


def test_an_error_in_the_middle_changes_nothing(engine):
    conversation = Conversation(engine)
    say(conversation, TURNS[0])
    before = seen(conversation)
    for error in (BrokenPipeError, RuntimeError):

        def show(piece, error=error):
            raise error

        with pytest.raises(error):
            conversation.generate(TURNS[1], Sampling(6), show)
        assert_unchanged(conversation, before)


def test_stop_strings_end_the_answer_before_them(engine):
    free = Conversation(engine).generate(TURNS[0], Sampling(12))
    stop = free.text[4:7]
    assert free.text.index(stop) == 4
    pieces = []
    conversation = Conversation(engine)
    answer = conversation.generate(TURNS[0], Sampling(12, stop=("never said", stop)), pieces.append)
    assert answer.text == free.text[:4] == "".join(pieces) and answer.why == "stop string" and answer.stopped
    assert answer.tokens == free.tokens[: len(answer.tokens)] and len(answer.tokens) < 12
    assert conversation.messages[-1]["content"] == free.text[:4]
    say(conversation, TURNS[1])


def test_what_may_become_a_stop_string_is_held_back(engine):
    encode = engine.text.encode

    def said(text, *stop):
        pieces = []
        answer = Said(engine.text, stop, pieces.append)
        stopped = any(answer.push(token) for token in encode(text))
        if not stopped:
            answer.end()
        assert "".join(pieces) == answer.text
        return pieces, stopped

    assert said("xSTxSTOPy", "STOP") == (["x", "STx"], True)
    assert said("xST", "STOP") == (["x", "ST"], False)  # it never came
    assert said("aab", "ab") == (["a"], True)  # one that starts within the beginning of another
    assert said("abc", "zzz") == (["a", "b", "c"], False)
    assert said("oneEND", "END", "neE") == (["o"], True)  # the first to be complete


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
        stopping.model(torch.tensor([ids]), past_key_values=cache)
        assert_same_memory(before, stored(cache.memory))  # reading does not write
        cache.write = True
        new = stopping.text.encode(f"<|end|><|user|>{OTHERS[0]}<|end|><|assistant|>")
        expected = stopping.model(torch.tensor([new]), past_key_values=cache).logits[0, -1]
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
    from deltamem_tool.memory_file import StoredMemory

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


def test_answers_together_are_those_alone(engine):
    """Different prompts, contexts of different lengths, and none of them is disturbed by another's end."""
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
            found = generate_together(together, contents, Sampling(7), tell)
            expected = [one.generate(content, Sampling(7)) for one, content in zip(alone, contents, strict=True)]
            assert found == expected
            assert ["".join(pieces[i]) for i in range(3)] == [answer.text for answer in found]
            for one, other in zip(together, alone, strict=True):
                assert (one.context, one.messages) == (other.context, other.messages)
                assert_same_memory(one.memory, other.memory, TOLERANCE)
        assert [say(one, "and now?") for one in together] == [say(one, "and now?") for one in alone]
        assert together[1].undo() and together[1].undo() and together[1].undo()
        assert together[1].context.tokens == 0
    assert len({len(answer.tokens) for answer in found}) > 1  # they did end at different times


def test_a_batch_in_a_model_whose_layers_have_windows():
    model = make_engine(use_sliding_window=True, sliding_window=7, layer_types=["sliding_attention"] * 2)
    together, alone = ([Conversation(model) for _ in OTHERS] for _ in range(2))
    for contents in (OTHERS, TURNS):
        found = generate_together(together, contents, Sampling(7))
        assert found == [one.generate(content, Sampling(7)) for one, content in zip(alone, contents, strict=True)]
        for one, other in zip(together, alone, strict=True):
            assert_same_memory(one.memory, other.memory, TOLERANCE)


def test_ctrl_c_in_a_batch_leaves_every_row_where_it_was(engine):
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
    """The second conversation's, which is kept for `undo`."""
    whole = engine.memory
    second = conversations[1]._place.past

    def memory(past):
        if past is second:
            raise OSError("no space left")
        return whole(past)

    monkeypatch.setattr(engine, "memory", memory)


def failing_change(engine, conversations, monkeypatch):
    """When the first conversation has gone on already."""

    class Interrupted(Conversation):
        interrupted = False

        def __setattr__(self, name, value):
            if not self.interrupted:
                object.__setattr__(self, "interrupted", True)
                raise KeyboardInterrupt
            object.__setattr__(self, name, value)

    conversations[1].__class__ = Interrupted


@pytest.mark.parametrize("fail", [failing_callback, failing_memory, failing_change])
def test_a_batch_goes_on_as_a_whole_or_not_at_all(fail, monkeypatch):
    engine = make_engine()
    conversations, twins = ([Conversation(engine) for _ in range(3)] for _ in range(2))
    for group in (conversations, twins):
        generate_together(group, OTHERS, Sampling(4))
    before = [seen(conversation) for conversation in conversations]
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
    before = [seen(conversation) for conversation in conversations]
    with pytest.raises(ExportError, match="Conversation 2: There is nothing to answer"):
        generate_together(conversations, ["three", ""], Sampling(2))
    for conversation, place in zip(conversations, before, strict=True):
        assert_unchanged(conversation, place)
    with pytest.raises(ExportError, match="Conversation 1: There is nothing to answer"):
        generate_together([Conversation(engine), Conversation(engine)], ["", "hello"])
    for wrong in ([conversations[0]] * 2, [conversations[0], Conversation(engine)], conversations[:1], []):
        with pytest.raises(ConfigError, match="together"):
            generate_together(wrong, ["a", "b"])


def plain(engine: TorchModel) -> TorchModel:
    """Without a chat template, so that an empty text has no tokens."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    model = TorchModel(engine.model, tokenizer)
    model.stop_tokens = frozenset()
    return model


def test_plain_text_goes_through_the_window_too(engine):
    conversation = Conversation(plain(engine), window=30)
    for _ in range(6):
        say(conversation, "one two three ")
    assert conversation.context.dropped > 0 and conversation.context.tokens <= 30
    assert len(conversation.messages) == 12


@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.3}, {"temperature": 50.0, "seed": 0}], ids=str)
def test_logits_that_mean_no_token_are_never_chosen(options):
    """More logits than tokens, and than the configuration says: likelier than any token's."""
    engine = make_engine()
    step, tokens = engine.step, len(tiny_tokenizer())

    def wider(*inputs):
        logits, past = step(*inputs)
        return np.pad(logits, ((0, 0), (0, 9)), constant_values=1e3), past

    expected = Conversation(engine).generate(TURNS[0], Sampling(12, **options))
    engine.step = wider
    answer = Conversation(engine).generate(TURNS[0], Sampling(12, **options))
    assert max(answer.tokens) < tokens
    if "seed" not in options:  # which draws from as many numbers as there are logits
        assert answer == expected
    engine.stop_tokens = frozenset({tokens + 4})
    assert Conversation(engine).generate(TURNS[0], Sampling(12, **options)).tokens == (tokens + 4,)


def test_many_threads_answer_as_one(engine):
    def talk(number: int):
        conversation = Conversation(engine)
        return say(conversation, OTHERS[number % 3], TURNS[number % 3]), conversation.memory

    expected = [talk(number) for number in range(3)]
    with ThreadPoolExecutor(6) as threads:
        for number, (tokens, memory) in enumerate(threads.map(talk, range(12))):
            assert tokens == expected[number % 3][0]
            assert_same_memory(memory, expected[number % 3][1])


def test_a_slow_tokenizer_is_refused(engine):
    class Slow:
        is_fast = False

    with pytest.raises(DataError, match="slow"):
        TorchModel(engine.model, Slow())

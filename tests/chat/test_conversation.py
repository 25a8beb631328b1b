"""Conversations over PyTorch: turns as `generate` makes them, and everything that can happen between and within them.

The same code runs over ONNX Runtime: tests/onnx/runtime/test_engine.py compares the two.
"""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

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
    in_generate,
    make_engine,
    say,
    state_of,
)
from helpers.tiny import tiny_tokenizer

from deltamem_tool import MemoryState
from deltamem_tool.chat.conversation import Context, Conversation, Sampling
from deltamem_tool.chat.generation import AnswerStream
from deltamem_tool.chat.torch_engine import TorchModel
from deltamem_tool.errors import DataError, DeltaMemError, MemoryStateError
from deltamem_tool.memory.file import read_memory
from deltamem_tool.memory.shared_file import MemoryConflict


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"name": "smollm3"},
        {"use_sliding_window": True, "sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]},
    ],
    ids=["qwen3", "smollm3", "a window in a layer"],
)
def test_greedy_turns_match_generate(changes):
    engine = make_engine(**changes)
    conversation = Conversation(engine)
    expected, memory = in_generate(engine, TURNS, 6)
    assert say(conversation, *TURNS) == expected
    for layer, state in conversation.memory.states.items():
        torch.testing.assert_close(torch.from_numpy(state), memory.layers[layer], rtol=0, atol=TOLERANCE)


def test_the_module_imports_neither_torch_nor_onnx_runtime():
    code = "import sys, deltamem_tool.chat.conversation; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "onnxruntime"} & set(result.stdout.split())


def test_context_and_messages_are_reported(engine):
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


def test_undo_removes_turns_one_by_one(engine):
    conversation, places = Conversation(engine), []
    for turn in TURNS:
        places.append(state_of(conversation))
        say(conversation, turn)
    for turn, place in zip(reversed(TURNS), reversed(places), strict=True):
        answer = conversation.messages[-1]
        assert conversation.undo()
        assert_unchanged(conversation, place)
        say(conversation, turn)  # the same again, from the same state
        assert conversation.messages[-1] == answer
        assert conversation.undo()
    assert not conversation.undo()
    assert conversation.context.tokens == 0 and conversation.messages == []


def test_turns_after_undo_match_a_conversation_without_the_undone_ones(engine):
    straight, back = Conversation(engine), Conversation(engine)
    say(straight, TURNS[0])
    say(back, TURNS[0], OTHERS[0], OTHERS[2])
    assert back.undo() and back.undo()
    assert say(back, TURNS[1]) == say(straight, TURNS[1])
    assert_same_memory(back.memory, straight.memory)


def test_forget_starts_a_new_conversation(engine):
    conversation = Conversation(engine)
    say(conversation, *TURNS)
    conversation.forget()
    assert not any(state.any() for state in conversation.memory.states.values())
    assert conversation.context.tokens == 0 and conversation.messages == [] and not conversation.undo()
    assert say(conversation, OTHERS[0]) == say(Conversation(engine), OTHERS[0])


def test_loading_a_memory_keeps_the_context(engine, tmp_path):
    other, conversation = Conversation(engine), Conversation(engine)
    say(other, OTHERS[2])
    other.save_memory(tmp_path / "memory")
    say(conversation, TURNS[0])
    context, messages, memory = state_of(conversation)
    conversation.load_memory(tmp_path / "memory")
    assert (conversation.context, conversation.messages) == (context, messages)
    assert_same_memory(conversation.memory, other.memory)

    # A memory of another adapter, or a missing file, changes nothing.
    before = state_of(conversation)
    MemoryState({i: torch.zeros(1, 2, 4, 4) for i in (0, 1)}, "another").save(tmp_path / "another")
    with pytest.raises(MemoryStateError, match="another adapter"):
        conversation.load_memory(tmp_path / "another")
    with pytest.raises(MemoryStateError, match=r"memory file .*nowhere does not exist"):
        conversation.load_memory(tmp_path / "nowhere")
    assert_unchanged(conversation, before)
    # The loaded memory is undone first, and then the turn before it.
    assert conversation.undo()
    assert_unchanged(conversation, (context, messages, memory))
    assert conversation.undo()
    assert not any(state.any() for state in conversation.memory.states.values())


def test_a_loaded_file_is_saved_unless_another_program_changed_it(engine, tmp_path):
    """Two programs load a file, continue the conversation and save it: what the first one saved stays."""
    one, two, file = Conversation(engine), Conversation(engine), tmp_path / "me"
    one.save_memory(file)
    for conversation, turn in ((one, TURNS[0]), (two, OTHERS[0])):
        conversation.load_memory(file)
        say(conversation, turn)
    one.save_memory(file)
    with pytest.raises(MemoryConflict, match="me was changed by another program"):
        two.save_memory(file)
    assert_same_memory(read_memory(file), one.memory)
    assert_same_memory(read_memory(tmp_path / "me-2"), two.memory)
    say(one, TURNS[1])
    one.save_memory(file)  # its own save does not count as a change
    assert_same_memory(read_memory(file), one.memory)


def test_ctrl_c_while_text_is_shown_keeps_the_answer_so_far(engine):
    conversation, pieces = Conversation(engine), []

    def show(piece):
        pieces.append(piece)
        if len(pieces) == 3:
            raise KeyboardInterrupt

    say(conversation, TURNS[0])
    answer = conversation.generate(TURNS[1], Sampling(12), show)
    assert answer.why == "interrupted" and not answer.stopped and 3 <= len(answer.tokens) < 12
    assert answer.text == "".join(pieces) and conversation.messages[-1]["content"] == answer.text
    # It continues like one whose answer was limited to that length.
    twin = Conversation(engine)
    assert say(twin, TURNS[0], TURNS[1], tokens=6)[0] and twin.undo()
    say(twin, TURNS[1], tokens=len(answer.tokens))
    assert_unchanged(conversation, state_of(twin))
    assert say(conversation, TURNS[2]) == say(twin, TURNS[2])


@pytest.mark.parametrize("call", [1, 2, 4])
@pytest.mark.parametrize("after", [False, True], ids=["before the call", "after the call"])
def test_a_conversation_continues_after_ctrl_c_between_tokens(call, after):
    """Also in the call over the prompt, in which case nothing changes."""
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
        before = state_of(conversation)
        with pytest.raises(KeyboardInterrupt):
            conversation.generate(TURNS[0], Sampling(8))
        assert_unchanged(conversation, before)
    else:
        answer = conversation.generate(TURNS[0], Sampling(8))
        assert answer.why == "interrupted" and len(answer.tokens) == call - 1
        say(twin, TURNS[0], tokens=call - 1)
        assert_unchanged(conversation, state_of(twin))
    engine.step = step
    assert say(conversation, TURNS[1]) == say(twin, TURNS[1])
    assert_same_memory(conversation.memory, twin.memory, TOLERANCE)


def test_placeholders_of_answers_are_rejected_in_a_prompt(engine):
    conversation = Conversation(engine)
    before = state_of(conversation)
    with pytest.raises(DataError, match=r"U\+E000"):
        conversation.generate("a \ue0000\ue000 b", Sampling(1))
    assert_unchanged(conversation, before)


def test_an_error_during_an_answer_changes_nothing(engine):
    conversation = Conversation(engine)
    say(conversation, TURNS[0])
    before = state_of(conversation)
    for error in (BrokenPipeError, RuntimeError):

        def show(piece, error=error):
            raise error

        with pytest.raises(error):
            conversation.generate(TURNS[1], Sampling(6), show)
        assert_unchanged(conversation, before)


def test_an_answer_ends_before_a_stop_string(engine):
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


def test_text_that_may_become_a_stop_string_is_held_back(engine):
    encode = engine.text.encode

    def streamed(text, *stop):
        pieces = []
        answer = AnswerStream(engine.text, stop, pieces.append)
        stopped = any(answer.push(token) for token in encode(text))
        if not stopped:
            answer.end()
        assert "".join(pieces) == answer.text
        return pieces, stopped

    assert streamed("xSTxSTOPy", "STOP") == (["x", "STx"], True)
    assert streamed("xST", "STOP") == (["x", "ST"], False)  # it does not occur
    assert streamed("aab", "ab") == (["a"], True)  # one starts inside another
    assert streamed("abc", "zzz") == (["a", "b", "c"], False)
    assert streamed("oneEND", "END", "neE") == (["o"], True)  # the first to be completed


@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.3}, {"temperature": 50.0, "seed": 0}], ids=str)
def test_logits_without_a_token_are_never_chosen(options):
    """There are more logits than tokens and than the config says, and the extra ones are the largest."""
    engine = make_engine()
    step, tokens = engine.step, len(tiny_tokenizer())

    def wider(*inputs):
        logits, past = step(*inputs)
        return np.pad(logits, ((0, 0), (0, 9)), constant_values=1e3), past

    expected = Conversation(engine).generate(TURNS[0], Sampling(12, **options))
    engine.step = wider
    answer = Conversation(engine).generate(TURNS[0], Sampling(12, **options))
    assert max(answer.tokens) < tokens
    if "seed" not in options:  # which draws as many random numbers as there are logits
        assert answer == expected
    engine.stop_tokens = frozenset({tokens + 4})
    assert Conversation(engine).generate(TURNS[0], Sampling(12, **options)).tokens == (tokens + 4,)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}], ids=str)
@pytest.mark.parametrize("fed", [1, 3])
def test_nan_logits_raise_and_change_nothing(options, fed):
    """Covers the first token and the middle of an answer."""
    engine = make_engine()
    conversation = Conversation(engine)
    say(conversation, TURNS[0])
    before, step, calls = state_of(conversation), engine.step, []

    def broken(*inputs):
        logits, past = step(*inputs)
        calls.append(inputs)
        return logits * (np.nan if len(calls) >= fed else 1), past

    engine.step = broken
    with pytest.raises(DeltaMemError, match="logits contain NaN"):
        conversation.generate(TURNS[1], Sampling(6, **options))
    assert len(calls) == fed
    assert_unchanged(conversation, before)
    engine.step = step
    assert say(conversation, TURNS[1]) == say(Conversation(engine), *TURNS[:2])[1:]


def test_answers_in_threads_match_sequential_ones(engine):
    def talk(number: int):
        conversation = Conversation(engine)
        return say(conversation, OTHERS[number % 3], TURNS[number % 3]), conversation.memory

    expected = [talk(number) for number in range(3)]
    with ThreadPoolExecutor(6) as threads:
        for number, (tokens, memory) in enumerate(threads.map(talk, range(12))):
            assert tokens == expected[number % 3][0]
            assert_same_memory(memory, expected[number % 3][1])


def test_a_slow_tokenizer_raises(engine):
    class Slow:
        is_fast = False

    with pytest.raises(DataError, match="slow"):
        TorchModel(engine.model, Slow())

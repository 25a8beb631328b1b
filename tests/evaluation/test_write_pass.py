"""Histories become memories: session by session, in chunks, in any batch."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from evaluation.asked import history, reading
from helpers.tiny import randomise, tiny_model

from deltamem_tool import DeltaMemConfig, MemoryCache, attach
from deltamem_tool.errors import DataError
from deltamem_tool.evaluation import write_pass as writing
from deltamem_tool.evaluation.subject import Subject
from deltamem_tool.evaluation.write_pass import memorise
from deltamem_tool.memory.attach import adapter_of
from deltamem_tool.segments.template import render

STATE_TOLERANCE = 5e-5  # float32 against float32: padded in a batch, and alone in pieces
HISTORIES = [history(number, sessions) for number, sessions in ((1, 3), (22, 1), (333, 2))]


@pytest.fixture(scope="module", params=["token", "message"])
def model(request, tokenizer):
    model = tiny_model(vocab_size=len(tokenizer))
    randomise(attach(model, DeltaMemConfig(rank=4, granularity=request.param)))
    return model


@torch.no_grad()
def memories_one_by_one(model, tokenizer, sessions):
    """The memories after writing message by message, with an empty context for each session."""
    memory = None
    by_messages = adapter_of(model).config.granularity == "message"
    for session in sessions:
        cache, length = MemoryCache(model, memory), 0
        for count in range(1, len(session) + 1):
            text = render(tokenizer, session[:count])
            ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
            model(ids[:, length:], cache=cache)
            length = ids.shape[1]
            if by_messages:
                cache.end_segment()
        memory = cache.memory
    return memory


@pytest.mark.parametrize(("batch_size", "chunk"), [(100, 4096), (2, 4096), (100, 7)])
def test_each_memory_holds_its_own_history(model, tokenizer, batch_size, chunk, monkeypatch):
    monkeypatch.setattr(writing, "CHUNK", chunk)
    reports = []
    memory = memorise(Subject.from_model(model, tokenizer), HISTORIES, batch_size, lambda *done: reports.append(done))
    assert reports[-1] == (3, 3)
    for row, sessions in enumerate(HISTORIES):
        alone = memories_one_by_one(model, tokenizer, sessions)
        for layer, state in alone.layers.items():
            assert len(memory.states[layer]) == 3
            np.testing.assert_allclose(memory.states[layer][row : row + 1], state, atol=STATE_TOLERANCE, rtol=0)
    assert not np.array_equal(memory.states[0][0], memory.states[0][1])


def test_each_session_starts_with_an_empty_context(model, tokenizer):
    """In one session, the second half would see the first one, and would write something else."""
    two = HISTORIES[2]
    subject = Subject.from_model(model, tokenizer)
    apart = memorise(subject, [two])
    together = memorise(subject, [[[message for session in two for message in session]]])
    assert np.abs(apart.states[1] - together.states[1]).max() > 100 * STATE_TOLERANCE


def test_a_session_that_is_too_long_is_named(tokenizer):
    histories = [HISTORIES[1], [HISTORIES[1][0], HISTORIES[0][0] * 3]]
    with pytest.raises(DataError, match=r"talks:3: session 2 of its history is too long for the model: .* tokens"):
        memorise(reading(tokenizer, positions=80), histories, places=["a", "talks:3"])


def test_a_session_that_is_not_text_is_named(tokenizer):
    histories = [HISTORIES[1], [HISTORIES[1][0], [{"role": "user", "content": "half \ud83d"}]]]
    with pytest.raises(DataError, match=r"^talks:3: session 2 of its history: The conversation is not Unicode text"):
        memorise(reading(tokenizer, positions=80), histories, places=["a", "talks:3"])


def test_a_padding_token_unknown_to_the_model_works(model, tokenizer):
    other = copy.deepcopy(tokenizer)
    other.add_special_tokens({"pad_token": "[PAD]"})
    expected = memorise(Subject.from_model(model, tokenizer), HISTORIES)
    memories = memorise(Subject.from_model(model, other), HISTORIES)
    for layer, state in expected.states.items():
        np.testing.assert_array_equal(memories.states[layer], state)

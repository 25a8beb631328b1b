"""The recall task: what is counted, and that each control controls what it says."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tiny import randomise, tiny_model

from deltamem_tool import DeltaMemConfig, MemoryCache, attach, detach, dialogues
from deltamem_tool.chat_template import render
from deltamem_tool.errors import DataError
from deltamem_tool.evaluation import recall
from deltamem_tool.evaluation.recall import CONDITIONS, MAX_NEW_TOKENS, answer, bootstrap, memorise, recall_episodes
from deltamem_tool.evaluation.record import recall_json
from deltamem_tool.evaluation.report import plot_recall, recall_table
from deltamem_tool.surgery import adapter_of

STATE_TOLERANCE = 5e-5  # float32 against float32: padded in a batch, and alone in pieces


@pytest.fixture(scope="module")
def model(tokenizer):
    model = tiny_model(vocab_size=len(tokenizer))
    randomise(attach(model, DeltaMemConfig(rank=4)))
    return model


@pytest.fixture(scope="module")
def told():
    return recall_episodes(2, 5, seed=0)


@pytest.fixture(scope="module")
def memory(model, tokenizer, told):
    return memorise(model, tokenizer, told)


def plain_answers(tokenizer, told, context):
    """What the same base says that never had a memory, one question at a time."""
    base = tiny_model(vocab_size=len(tokenizer))
    said = []
    for episode in told:
        messages = [*(episode.history if context else []), episode.question]
        ids = tokenizer(render(tokenizer, messages, generation_prompt=True), return_tensors="pt").input_ids
        output = base.generate(ids, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        said.append(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip())
    return said


def test_a_bootstrap_is_a_mean_and_its_interval():
    assert bootstrap(np.ones(50)) == recall.Score(1.0, 1.0, 1.0)
    assert bootstrap(np.zeros(50)) == recall.Score(0.0, 0.0, 0.0)
    half = bootstrap(np.arange(400) % 2 == 0)
    assert half.mean == 0.5
    normal = 1.96 * 0.5 / np.sqrt(400)
    assert half.low == pytest.approx(0.5 - normal, abs=0.01) and half.high == pytest.approx(0.5 + normal, abs=0.01)
    assert bootstrap(np.arange(400) % 2 == 0) == half
    few, many = (bootstrap(np.arange(n) % 4 == 0) for n in (20, 2000))
    assert few.mean == many.mean == 0.25 and few.high - few.low > 5 * (many.high - many.low)


def test_episodes_are_held_out_and_repeatable():
    told = recall_episodes(4, 50, seed=3)
    assert told == recall_episodes(4, 50, seed=3) != recall_episodes(4, 50, seed=4)
    held_out = {fact.answer for _, facts in dialogues.SPLITS.values() for fact in facts}
    assert all(episode.answer in held_out for episode in told)
    assert all(episode.question["role"] == "user" for episode in told)
    assert all(episode.answer not in str(episode.history) for episode in told)  # told in other words
    for episode in told:
        value = episode.answer.rstrip(".").split()[-1]
        assert any(value in message["content"] for message in episode.history)


@pytest.mark.parametrize("condition", ["zero_state", "scale_zero", "no_memory"])
def test_controls_without_a_memory_say_what_the_base_says(model, tokenizer, told, memory, condition):
    assert answer(model, tokenizer, told, memory, condition) == plain_answers(tokenizer, told, context=False)


def test_full_context_is_the_base_with_everything_in_view(model, tokenizer, told, memory):
    expected = plain_answers(tokenizer, told, context=True)
    assert answer(model, tokenizer, told, memory, "full_context") == expected
    assert expected != plain_answers(tokenizer, told, context=False)


def test_a_donor_is_another_conversation(model, tokenizer, told, memory):
    own = answer(model, tokenizer, told, memory, "state_only")
    donated = answer(model, tokenizer, told, memory, "donor_state")
    moved = answer(model, tokenizer, told, memory.select([1, 2, 3, 4, 0]), "state_only")
    assert donated == moved and all(said != other for said, other in zip(own, donated, strict=True))
    with pytest.raises(DataError, match="no other"):
        answer(model, tokenizer, told[:1], memory.select([0]), "donor_state")
    with pytest.raises(ValueError, match="condition must be one of state_only"):
        answer(model, tokenizer, told, memory, "no_such")


@pytest.mark.parametrize("condition", CONDITIONS)
def test_batches_do_not_matter(model, tokenizer, told, memory, condition):
    whole = answer(model, tokenizer, told, memory, condition)
    assert answer(model, tokenizer, told, memory, condition, batch_size=2) == whole


def test_memories_are_of_their_own_conversations(model, tokenizer, told, memory):
    for row, episode in enumerate(told):
        alone = memorise(model, tokenizer, [episode])
        for layer, state in alone.layers.items():
            torch.testing.assert_close(memory.layers[layer][row : row + 1], state, atol=2e-5, rtol=0)
    pieces = memorise(model, tokenizer, told, batch_size=2)
    assert pieces.batch_size == len(told)


def test_controls_leave_the_model_as_it_was(model, tokenizer, told, memory):
    before = {name: weight.clone() for name, weight in adapter_of(model).state_dict().items()}
    said = answer(model, tokenizer, told, memory, "state_only")
    for condition in CONDITIONS:
        answer(model, tokenizer, told, memory, condition)
    assert all(torch.equal(weight, before[name]) for name, weight in adapter_of(model).state_dict().items())
    assert answer(model, tokenizer, told, memory, "state_only") == said
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("condition", ["no_memory", "scale_zero"])
def test_a_control_that_fails_leaves_the_model_as_it_was(model, tokenizer, told, memory, condition, monkeypatch):
    before = adapter_of(model).fingerprint
    with monkeypatch.context() as patched:
        patched.setattr(recall, "_generate", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            answer(model, tokenizer, told, memory, condition)
    assert adapter_of(model).fingerprint == before


def test_exact_matches_are_counted(tokenizer, monkeypatch, tmp_path):
    """A stub that is right in a known share of the cases, and wrong by a little in the others."""
    model = tiny_model(vocab_size=len(tokenizer))
    attach(model, DeltaMemConfig(rank=4))
    asked = []

    def stub(model, tokenizer, episodes, memory, condition, batch_size):
        asked.append((len(episodes), condition, memory.batch_size))
        right = {"state_only": 7, "full_context": 10}.get(condition, 0)
        almost = [episode.answer.rstrip(".") for episode in episodes[right:]]
        return [episode.answer for episode in episodes[:right]] + almost

    monkeypatch.setattr(recall, "answer", stub)
    reports = []
    result = recall.evaluate_recall(model, tokenizer, (1, 3), 10, 5, report=lambda *said: reports.append(said))
    assert asked == [(10, condition, 10) for _ in (1, 3) for condition in CONDITIONS]
    assert reports == [(done, 12) for done in range(1, 13)]
    said = recall_json(result)
    assert json.loads(json.dumps(said)) == said
    assert said["facts"] == [1, 3] and said["state_only"] == [0.7, 0.7] and said["full_context"] == [1.0, 1.0]
    assert all(said[name] == [0.0, 0.0] for name in ("zero_state", "donor_state", "scale_zero", "no_memory"))
    low, high = said["intervals"]["state_only"][0]
    assert 0.3 <= low < 0.7 < high <= 1.0
    assert recall_table(result).row_count == len(CONDITIONS)
    plot_recall(result, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    detach(model)


def test_a_memory_that_writes_by_messages_is_told_message_by_message(tokenizer, told):
    model = tiny_model(vocab_size=len(tokenizer))
    randomise(attach(model, DeltaMemConfig(rank=4, granularity="message")))
    memory = memorise(model, tokenizer, told, batch_size=2)
    for row, episode in enumerate(told):
        cache, seen = MemoryCache(model), 0
        for count in range(1, len(episode.history) + 1):
            text = render(tokenizer, episode.history[:count])
            ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
            with torch.no_grad():
                model(ids[:, seen:], past_key_values=cache)
            seen = ids.shape[1]
            cache.end_segment()
        for layer, state in cache.memory.layers.items():
            torch.testing.assert_close(memory.layers[layer][row], state[0], atol=STATE_TOLERANCE, rtol=0)
    assert not memory.open_tokens.any()

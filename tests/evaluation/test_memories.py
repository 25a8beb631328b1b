"""Selecting and averaging rows of memories, and permuting their layers."""

from __future__ import annotations

import numpy as np
import pytest
from evaluation.asked import Asked, item
from helpers.tiny import randomise, tiny_model

from deltamem_tool import DeltaMemConfig, attach
from deltamem_tool.errors import ConfigError
from deltamem_tool.evaluation import conditions, questions
from deltamem_tool.evaluation import subject as subjects
from deltamem_tool.evaluation.conditions import PERMUTED_STATE, EvalProtocol
from deltamem_tool.evaluation.memories import has_layers_to_permute, mean_rows, permute_layers, take_rows
from deltamem_tool.evaluation.questions import other_histories
from deltamem_tool.evaluation.runner import evaluate
from deltamem_tool.memory.file import MemoryShape, StoredMemory

MEMORY = EvalProtocol.parse("memory")
SEEDS = range(20)


def stored(layers: int, rows: int = 4, segment: int = 0) -> StoredMemory:
    rng = np.random.default_rng(0)
    states = {3 * layer: rng.standard_normal((rows, 2, 4, 4)).astype(np.float32) for layer in range(layers)}
    segments = {layer: rng.standard_normal((rows, segment)).astype(np.float32) for layer in states if segment}
    return StoredMemory(states, segments, "a")


def test_rows_are_selected_and_averaged():
    memory = stored(2, segment=5)
    taken, mean = take_rows(memory, [2, 0, 2]), mean_rows(memory, [[0, 3], [1, 2]])
    for before, of_taken, of_mean in (
        (memory.states, taken.states, mean.states),
        (memory.open_segments, taken.open_segments, mean.open_segments),
    ):
        for layer, array in before.items():
            assert np.array_equal(of_taken[layer], np.stack([array[2], array[0], array[2]]))
            by_hand = np.stack([(array[0].astype(float) + array[3]) / 2, (array[1].astype(float) + array[2]) / 2])
            assert np.array_equal(of_mean[layer], by_hand.astype(np.float32))
    alone = mean_rows(memory, [[1], [3]])
    assert all(np.array_equal(alone.states[layer], memory.states[layer][[1, 3]]) for layer in memory.states)


@pytest.mark.parametrize("layers", [2, 3, 7])
def test_permuting_moves_the_state_of_every_layer(layers):
    memory, drawn = stored(layers), set()
    for seed in SEEDS:
        permuted = permute_layers(memory, seed).states
        source = [
            next(other for other, state in memory.states.items() if np.array_equal(state, permuted[layer]))
            for layer in memory.states
        ]
        assert sorted(source) == sorted(memory.states)
        assert all(layer != other for layer, other in zip(memory.states, source, strict=True))
        drawn.add(tuple(source))
    assert len(drawn) > 1 or layers == 2  # two layers have one permutation
    first, again = (permute_layers(memory, 1).states for _ in range(2))
    assert all(np.array_equal(first[layer], again[layer]) for layer in first)


def test_only_memories_with_several_equal_layers_can_be_permuted():
    assert has_layers_to_permute(MemoryShape({0: (1, 4, 4), 5: (1, 4, 4)}))
    assert not has_layers_to_permute(MemoryShape({0: (1, 4, 4)}))
    assert not has_layers_to_permute(MemoryShape({0: (1, 4, 4), 5: (2, 4, 4)}))


def test_other_histories_are_the_next_ones_and_never_the_same(monkeypatch):
    items = [item(number, question) for number in range(5) for question in range(2)]
    everyone = {f"history {number}" for number in range(5)}
    for name, others in other_histories(items).items():
        assert set(others) == everyone - {name} and len(others) == 4
    monkeypatch.setattr(questions, "MEAN_OF", 2)
    assert other_histories(items)["history 3"] == ["history 4", "history 0"]


@pytest.mark.parametrize("granularity", ["token", "message"])
def test_the_mean_and_permuted_conditions_use_these_memories(granularity, tokenizer, monkeypatch):
    """Each of four histories gets the mean of the other three, and the condition's meaning says so."""
    model = tiny_model(vocab_size=len(tokenizer))
    randomise(attach(model, DeltaMemConfig(rank=4, granularity=granularity)))
    memories, own = {}, subjects.Subject.ask

    def watch(subject, prompts, memory, condition, new):
        memories[condition.name] = memory
        return own(subject, prompts, memory, condition, new)

    monkeypatch.setattr(subjects.Subject, "ask", watch)
    task = Asked([item(number) for number in range(4)])  # prompts have one length, so the order of the items is kept
    evaluation = evaluate(model, tokenizer, task, MEMORY, seed=3)
    right = memories["state"]
    for layer, state in right.states.items():
        mean = [np.delete(state, row, 0).mean(0, dtype=float).astype(np.float32) for row in range(4)]
        assert np.array_equal(memories["mean_state"].states[layer], np.stack(mean))
        permuted = permute_layers(right, 3).states[layer]
        assert np.array_equal(memories[PERMUTED_STATE].states[layer], permuted) and not np.array_equal(permuted, state)
    meanings = {condition.name: condition.meaning for condition in evaluation.conditions}
    assert meanings["mean_state"].endswith("the mean of the memories of 3 other histories")
    assert {condition.name for condition in evaluation.conditions} >= set(conditions.CONTROLS)


def test_a_limit_does_not_change_the_mean_state(tokenizer):
    model = tiny_model(vocab_size=len(tokenizer))
    randomise(attach(model, DeltaMemConfig(rank=4)))
    task = Asked([item(number) for number in range(5)])
    some, whole = (evaluate(model, tokenizer, task, MEMORY, limit=limit) for limit in (1, None))
    assert some.records == [record for record in whole.records if record.history == "history 0"]


def test_permuting_a_single_layer_raises(tokenizer):
    model = tiny_model(vocab_size=len(tokenizer))
    randomise(attach(model, DeltaMemConfig(rank=4, layers=[1])))
    evaluation = evaluate(model, tokenizer, Asked(), MEMORY)
    assert PERMUTED_STATE not in {condition.name for condition in evaluation.conditions}
    with pytest.raises(ConfigError, match=f"{PERMUTED_STATE} needs a memory of several layers"):
        evaluate(model, tokenizer, Asked(), MEMORY, only=("state", PERMUTED_STATE))

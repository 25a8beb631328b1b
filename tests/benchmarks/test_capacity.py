"""`benchmarks/capacity_replay.py`: the recording of a conversation matches what the model wrote and read."""

from __future__ import annotations

import capacity_replay
import pytest
import torch
from helpers.tiny import randomise, tiny_model
from replay import read

from deltamem_tool import DeltaMemConfig, attach
from deltamem_tool.evaluation.subject import Subject
from deltamem_tool.evaluation.tasks.recall import Recall
from deltamem_tool.evaluation.write_pass import memorise
from deltamem_tool.segments.encode import encode_chat

CLOSE = {"atol": 1e-5, "rtol": 1e-4}


@pytest.mark.parametrize(
    "options",
    [
        {"update_rule": "no_lambda"},
        {"update_rule": "standard", "state_heads": 2},
        {"granularity": "message"},
    ],
    ids=["TSW", "MSW", "SSW"],
)
def test_recordings_match_what_was_written_and_read(tokenizer, options):
    model = tiny_model(vocab_size=len(tokenizer))
    adapter = attach(model, DeltaMemConfig(rank=4, **options))
    randomise(adapter)
    items = Recall([2], 12, kind="changed", delay=6, between="facts", session=3).items()
    items = [item for item in items if len(item.history) == 3][:3]  # a batch has one number of sessions
    assert len(items) == 3
    recorded = capacity_replay.record(model, tokenizer, items)
    subject = Subject.from_model(model, tokenizer)
    memory = subject.engine.start(memorise(subject, [item.history for item in items])).memory
    queries, readings = capacity_replay.read_before_value(model, tokenizer, items, memory)
    for layer in adapter.layer_indices:
        torch.testing.assert_close(recorded.memory.layers[layer], memory.layers[layer], **CLOSE)
        torch.testing.assert_close(recorded.writes[layer].state(), memory.layers[layer], **CLOSE)
        torch.testing.assert_close(read(memory.layers[layer], queries[layer]), readings[layer], **CLOSE)
    starts = [encode_chat(tokenizer, [i.history[n] for i in items], "token").input_ids.shape[1] for n in range(3)]
    for row, item in enumerate(items):
        shown = ["".join(tokenizer.decode(ids) for ids in _tokens(tokenizer, item, recorded, row, starts))]
        attribute, stale, value = item.answers[0].split()[1], item.stale.split()[-1], item.answers[0].split()[-1]
        assert shown[0].count(f"my {attribute} is") + shown[0].count(f"My {attribute} is") == 2
        assert shown[0].index(stale.rstrip(".")) < shown[0].index(value.rstrip("."))
        assert shown[0].count("<|user|>") == shown[0].count("<|assistant|>") == 2
    assert not (recorded.later & recorded.fact).any() and not (recorded.later & ~recorded.real).any()
    last = [int(row.nonzero().max()) for row in recorded.fact]
    assert recorded.later.sum(1).tolist() == [int(recorded.real[n, end + 1 :].sum()) for n, end in enumerate(last)]


def _tokens(tokenizer, item, recorded, row, lengths):
    """The tokens of a row that belong to the fact, session by session."""
    start = 0
    for session, length in zip(item.history, lengths, strict=True):
        ids = encode_chat(tokenizer, [session], "token").input_ids[0]
        here = recorded.fact[row, start : start + len(ids)]
        assert recorded.real[row, start : start + length].sum() == len(ids)
        yield ids[here]
        start += length


def test_random_keys_replace_only_those_of_other_tokens(tokenizer):
    model = tiny_model(vocab_size=len(tokenizer))
    randomise(attach(model, DeltaMemConfig(rank=4, update_rule="no_lambda")))
    items = Recall([1], 4, session=2).items()
    prototypes = capacity_replay.Prototypes(model, tokenizer, 0)
    prediction = capacity_replay.predict(model, tokenizer, items, prototypes, 0)
    assert prediction["tokens since"] == 0 and prediction["gate"] is None and prediction["overlap"] is None
    assert prediction["left, own keys"] == prediction["left, random keys"] == pytest.approx(1.0)
    assert prediction == capacity_replay.predict(model, tokenizer, items, prototypes, 0)

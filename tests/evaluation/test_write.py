"""The option `write`: questions update the memory as `generate` does with a writing cache."""

from __future__ import annotations

import math

import pytest
import torch
from evaluation.asked import Asked, answers, item
from evaluation.test_likelihood import TOLERANCE, Likely, in_torch
from helpers.tiny import tiny_model

from deltamem_tool import DeltaMemConfig, MemoryCache, OnnxModel, attach, export_onnx
from deltamem_tool.errors import ConfigError, DataError
from deltamem_tool.evaluation.conditions import NOTHING, EvalProtocol
from deltamem_tool.evaluation.prompts import Views
from deltamem_tool.evaluation.runner import evaluate
from deltamem_tool.evaluation.scoring.scales import LOG_PROB
from deltamem_tool.evaluation.subject import Subject
from deltamem_tool.evaluation.write_pass import memorise
from deltamem_tool.memory.attach import adapter_of
from deltamem_tool.segments.template import render

MEMORY = EvalProtocol.parse("memory")
TASK = Asked([item(number, sessions=1 + number % 2) for number in range(3)])
BASES = ("no_adapter", "full_context", "bm25")


def memories(model, tokenizer, task):
    """The memory of each item's history, and zeros."""
    subject = Subject.from_model(model, tokenizer)
    own = [in_torch(memorise(subject, [each.history])) for each in task.items()]
    return {"state": own, "zero_state": [adapter_of(model).empty_memory(1)] * len(own)}


def test_answers_match_generate(model, tokenizer):
    written = evaluate(model, tokenizer, TASK, MEMORY, write=True, retrieved=True)
    unwritten = evaluate(model, tokenizer, TASK, MEMORY, retrieved=True)
    for condition, starts in memories(model, tokenizer, TASK).items():
        expected = []
        for each, start in zip(TASK.items(), starts, strict=True):
            ids = tokenizer(render(tokenizer, each.question, True), return_tensors="pt").input_ids
            cache = MemoryCache(model, start)
            output = model.generate(ids, cache=cache, max_new_tokens=TASK.max_new_tokens, do_sample=False)
            expected.append(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip())
        assert answers(written, condition) == expected != answers(unwritten, condition)
    for condition in BASES:
        assert answers(written, condition) == answers(unwritten, condition)


def test_likelihoods_match_a_loop_that_writes(model, tokenizer):
    task = Likely()
    evaluation = evaluate(model, tokenizer, task, MEMORY, write=True, only=("state", "zero_state", "no_adapter"))
    views = Views(Subject.from_model(model, tokenizer), MEMORY, 0)
    for condition, starts in memories(model, tokenizer, task).items():
        records = [record for record in evaluation.records if record.condition == condition]
        for each, start, record in zip(task.items(), starts, records, strict=True):
            ids = tokenizer(views.prompt(each, NOTHING), add_special_tokens=False).input_ids
            answer = tokenizer(each.answers[0], add_special_tokens=False).input_ids
            cache, values = MemoryCache(model, start), []
            with torch.no_grad():
                logits = model(torch.tensor([ids]), cache=cache).logits[0, -1]
                for token in answer:
                    values.append(math.log(logits.double().softmax(0)[token]))
                    logits = model(torch.tensor([[token]]), cache=cache).logits[0, -1]
            assert record.scores[LOG_PROB] == pytest.approx(sum(values) / len(values), abs=TOLERANCE)
    unwritten = evaluate(model, tokenizer, task, MEMORY, only=("zero_state", "no_adapter"))
    means = [evaluation.estimate(LOG_PROB, name).mean for name in ("zero_state", "no_adapter")]
    assert means[1] == unwritten.estimate(LOG_PROB, "no_adapter").mean
    assert abs(means[0] - means[1]) > 100 * TOLERANCE  # zeros after writing differ from the base


@pytest.mark.slow
def test_onnx_runtime_matches_pytorch_when_writing(model, tokenizer, tmp_path):
    export_onnx(model, tokenizer, tmp_path / "onnx")
    in_torch, in_onnx = (
        evaluate(one, its_tokenizer, TASK, MEMORY, write=True)
        for one, its_tokenizer in ((model, tokenizer), (OnnxModel(tmp_path / "onnx"), None))
    )
    for condition in in_onnx.conditions:
        assert answers(in_onnx, condition.name) == answers(in_torch, condition.name), condition.name


def test_records_with_and_without_writing_are_not_mixed(model, tokenizer, tmp_path):
    evaluate(model, tokenizer, TASK, MEMORY, only=("state",), folder=tmp_path)
    with pytest.raises(DataError, match="Its write differ"):
        evaluate(model, tokenizer, TASK, MEMORY, only=("state",), folder=tmp_path, write=True)


def test_adapters_that_write_by_segment_raise(tokenizer):
    model = tiny_model(vocab_size=len(tokenizer))
    attach(model, DeltaMemConfig(rank=4, granularity="message"))
    with pytest.raises(ConfigError, match=r"(?s)cannot write.*message by message"):
        evaluate(model, tokenizer, TASK, MEMORY, write=True)

"""States of a hybrid base in the server's batch: each answer matches the one the request would get alone."""

from __future__ import annotations

import random

import pytest
from helpers.hybrids import hybrid
from helpers.shared_folder import folder_once
from helpers.tiny import tiny_tokenizer
from serve.batching.alone import answered_alone, assert_close, random_job

from deltamem_tool.onnx.export.export import export_onnx
from deltamem_tool.onnx.runtime.engine import OnnxModel
from deltamem_tool.serve.batching.scheduler import Scheduler

pytestmark = pytest.mark.slow  # they are exported


@pytest.fixture(params=[("message", "int8"), ("sentence", "none")], ids="-".join)
def engine(request, tmp_path_factory) -> OnnxModel:
    granularity, quantize = request.param

    def export(folder) -> None:
        tokenizer = tiny_tokenizer()
        model = hybrid("lfm2", tokenizer, granularity=granularity)
        export_onnx(model, tokenizer, folder / "onnx", quantize=quantize, group_size=16, base_model="someone/tiny")

    return OnnxModel(folder_once(tmp_path_factory, f"serve-lfm2-{granularity}-{quantize}", export) / "onnx")


def test_answers_match_under_random_arrivals_and_departures(engine, monkeypatch):
    monkeypatch.setattr("deltamem_tool.onnx.runtime.slots.FIRST_ROOM", 4)  # smaller than the rows become
    chance = random.Random(0)
    jobs = [random_job(engine, chance) for _ in range(10)]
    with Scheduler(engine, max_batch=4, piece=7) as scheduler:
        tickets = [scheduler.submit(job) for job in jobs]
        ends = [ticket.result() for ticket in tickets]
    for job, end in zip(jobs, ends, strict=True):
        tokens, memory = answered_alone(engine, job)
        assert list(end.answer.tokens) == tokens
        assert_close(end.memory, memory)

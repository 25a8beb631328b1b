"""Whoever joins and leaves meanwhile, in any order: an answer is the one that the request would get alone."""

from __future__ import annotations

import random

import pytest
from serve.batching.alone import answered_alone, assert_close, random_job

from deltamem_tool.serve.batching.job import Cancelled, Completion
from deltamem_tool.serve.batching.scheduler import Scheduler


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_random_arrivals_and_departures(any_engine, seed, monkeypatch):
    monkeypatch.setattr("deltamem_tool.onnx.runtime.slots.FIRST_ROOM", 4)  # which the rows outgrow
    chance = random.Random(seed)
    jobs = [random_job(any_engine, chance) for _ in range(24)]
    waiting, reading, ends, cancelled = list(enumerate(jobs)), {}, {}, []
    with Scheduler(any_engine, max_batch=6, piece=7) as scheduler:
        while waiting or reading:
            if waiting and (not reading or chance.random() < 0.3):
                number, job = waiting.pop()
                ticket = scheduler.submit(job)
                reading[number] = ticket, iter(ticket)
                continue
            number = chance.choice(list(reading))
            ticket, events = reading[number]
            if chance.random() < 0.02:
                ticket.cancel()
            try:
                event = next(events)
            except Cancelled:
                cancelled.append(number)
                del reading[number]
                continue
            if isinstance(event, Completion):
                ends[number] = event
                del reading[number]
    assert len(ends) + len(cancelled) == len(jobs) and len(ends) > 12
    for number, end in ends.items():
        tokens, memory = answered_alone(any_engine, jobs[number])
        assert list(end.answer.tokens) == tokens, number
        assert_close(end.memory, memory)

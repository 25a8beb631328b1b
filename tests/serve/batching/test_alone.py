"""Whichever requests join and leave the batch, each answer matches the one the request would get alone."""

from __future__ import annotations

import random

import pytest
from serve.batching.alone import answered_alone, assert_close, random_job

from deltamem_tool.serve.batching.job import Cancelled, Completion
from deltamem_tool.serve.batching.scheduler import Scheduler


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_answers_match_under_random_arrivals_and_departures(any_engine, seed, monkeypatch):
    monkeypatch.setattr("deltamem_tool.onnx.runtime.slots.FIRST_ROOM", 4)  # smaller than the rows become
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


def test_short_prompts_are_prefilled_together(any_engine, monkeypatch):
    chance = random.Random(5)
    jobs = [random_job(any_engine, chance, longest=9) for _ in range(7)]
    started, start = [], any_engine.start

    def noted(memory):
        started.append(len(next(iter(memory.states.values()))))
        return start(memory)

    monkeypatch.setattr(any_engine, "start", noted)
    with Scheduler(any_engine, piece=32) as scheduler:
        with scheduler._changed:  # all requests have arrived when it looks
            tickets = [scheduler.submit(job) for job in jobs]
        ends = [ticket.result() for ticket in tickets]
        assert scheduler.counters.prompt_tokens == sum(len(job.tokens) for job in jobs)
    assert max(started) > 2
    for job, end in zip(jobs, ends, strict=True):
        tokens, memory = answered_alone(any_engine, job)
        assert list(end.answer.tokens) == tokens
        assert_close(end.memory, memory)

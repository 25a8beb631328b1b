"""The events that readers of an answer receive, and how often they wake up."""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
from serve.batching.test_scheduler import job_of

from deltamem_tool.chat.conversation import Conversation
from deltamem_tool.chat.sampling import Sampling
from deltamem_tool.serve.batching.scheduler import Scheduler
from deltamem_tool.serve.batching.ticket import LONGEST_PIECE_SECONDS, PIECE_SECONDS, Bell


def test_an_answer_without_streaming_is_the_same_text(engine):
    free = Conversation(engine).generate("hello there", Sampling(30))
    for stop in ((), (free.text[5:8],)):
        job = job_of(engine, "hello there", 30)
        job = replace(job, sampling=replace(job.sampling, stop=stop))
        with Scheduler(engine) as scheduler:
            *pieces, end = scheduler.submit(job)
            (whole,) = scheduler.submit(replace(job, streamed=False))
        assert whole.answer == end.answer and "".join(pieces) == end.answer.text
        assert (end.answer.text == free.text) is not bool(stop)


def test_waiting_pieces_are_joined(engine):
    job = job_of(engine, "hello there", 30)
    with Scheduler(engine) as scheduler:
        ticket = scheduler.submit(job)
        scheduler.submit(replace(job, sampling=Sampling(60))).result()  # by then, the other one has ended
        piece, end = ticket
    assert piece == end.answer.text == Conversation(engine).generate("hello there", Sampling(30)).text


def test_the_first_and_last_pieces_are_delivered_at_once(engine, monkeypatch):
    job = job_of(engine, "hello there", 30)

    async def read(ticket):
        return [event async for event in ticket]

    with Scheduler(engine) as scheduler:
        scheduler._bell.ring()  # from now on it pauses
        monkeypatch.setattr("deltamem_tool.serve.batching.ticket.PIECE_SECONDS", math.inf)
        *pieces, end = asyncio.run(read(scheduler.submit(job)))
    assert 1 <= len(pieces) <= 2 and "".join(pieces) == end.answer.text


BUSY, STARVED = 1.0, 0.1  # CPU seconds per wall-clock second
SOON, LATER = PIECE_SECONDS * 1.01, LONGEST_PIECE_SECONDS * 1.01


@pytest.mark.parametrize(
    ("seconds", "share", "readers", "woken"),
    [
        (PIECE_SECONDS / 2, BUSY, 1, False),
        (SOON, BUSY, 1, True),
        (SOON, STARVED, 1, True),
        (SOON, BUSY, 32, True),
        (SOON, STARVED, 32, False),  # almost nothing was computed in between
        (LATER, STARVED, 32, True),
        (SOON, BUSY, 100, False),  # waking them takes longer than the computation
        (LATER, BUSY, 1000, True),
    ],
)
def test_readers_are_woken_by_interval_and_cost(monkeypatch, seconds, share, readers, woken):
    now = SimpleNamespace(monotonic=lambda: 0.0, process_time=lambda: 0.0)
    monkeypatch.setattr("deltamem_tool.serve.batching.ticket.time", now)

    async def rung():
        bell, loop = Bell(), asyncio.get_running_loop()
        bell.ring()
        soon, later = asyncio.Event(), [asyncio.Event() for _ in range(readers)]
        bell.add(loop, soon, at_once=True)
        for arrived in later:
            bell.add(loop, arrived, at_once=False)
        now.monotonic, now.process_time = lambda: seconds, lambda: seconds * share
        bell.ring()
        await asyncio.wait_for(soon.wait(), 60)
        return {arrived.is_set() for arrived in later}

    assert asyncio.run(rung()) == {woken}

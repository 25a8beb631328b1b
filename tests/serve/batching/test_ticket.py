"""What readers get, and how often they are woken for it."""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace

import pytest
from chat.talking import make_engine
from serve.batching.test_scheduler import job_of

from deltamem_tool.chat.conversation import Conversation
from deltamem_tool.chat.sampling import Sampling
from deltamem_tool.serve.batching.scheduler import Scheduler
from deltamem_tool.serve.batching.ticket import Bell


@pytest.fixture(scope="module")
def engine():
    return make_engine(frozenset({40}))


def test_an_answer_that_is_not_streamed_comes_whole_and_is_the_same(engine):
    free = Conversation(engine).generate("hello there", Sampling(30))
    for stop in ((), (free.text[5:8],)):
        job = job_of(engine, "hello there", 30)
        job = replace(job, sampling=replace(job.sampling, stop=stop))
        with Scheduler(engine) as scheduler:
            *pieces, end = scheduler.submit(job)
            (whole,) = scheduler.submit(replace(job, streamed=False))
        assert whole.answer == end.answer and "".join(pieces) == end.answer.text
        assert (end.answer.text == free.text) is not bool(stop)


def test_pieces_that_wait_for_their_reader_are_one(engine):
    job = job_of(engine, "hello there", 30)
    with Scheduler(engine) as scheduler:
        ticket = scheduler.submit(job)
        scheduler.submit(replace(job, sampling=Sampling(60))).result()  # by then the other one has ended
        piece, end = ticket
    assert piece == end.answer.text == Conversation(engine).generate("hello there", Sampling(30)).text


def test_the_first_piece_and_the_end_do_not_wait_for_a_pause(engine):
    job = job_of(engine, "hello there", 30)

    async def read(ticket):
        return [event async for event in ticket]

    with Scheduler(engine) as scheduler:
        scheduler._bell = Bell(pause=math.inf)
        scheduler._bell.ring()  # from now on it pauses
        *pieces, end = asyncio.run(read(scheduler.submit(job)))
    assert 1 <= len(pieces) <= 2 and "".join(pieces) == end.answer.text


def test_a_bell_wakes_the_patient_after_its_pause():
    async def rung(pause):
        bell, loop = Bell(pause), asyncio.get_running_loop()
        bell.ring()
        soon, later = asyncio.Event(), asyncio.Event()
        bell.add(loop, soon, at_once=True)
        bell.add(loop, later, at_once=False)
        bell.ring()
        await asyncio.wait_for(soon.wait(), 60)
        return later.is_set()

    assert not asyncio.run(rung(math.inf))
    assert asyncio.run(rung(0.0))

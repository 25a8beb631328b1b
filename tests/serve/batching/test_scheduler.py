"""Many requests in one batch: each is answered as if it were alone."""

from __future__ import annotations

import numpy as np
import pytest
from chat.talking import OTHERS, TOLERANCE, TURNS, assert_same_memory

from deltamem_tool.chat.conversation import Conversation
from deltamem_tool.chat.engine import empty_memory
from deltamem_tool.chat.generation import Token
from deltamem_tool.chat.sampling import Sampling
from deltamem_tool.chat.transcript import Transcript
from deltamem_tool.errors import ConfigError, DataError, MemoryStateError
from deltamem_tool.memory.file import StoredMemory
from deltamem_tool.serve.batching.job import Cancelled, DeadlineExceeded, Job, QueueFull
from deltamem_tool.serve.batching.scheduler import Scheduler


def job_of(engine, content, tokens=8, tenant="a", memory=None, write=True, **options) -> Job:
    _, ids = Transcript().begin(engine.text, content)
    fed = tuple(Token(id, write) for id in ids)
    return Job(tenant, memory or empty_memory(engine), fed, Sampling(tokens), write, **options)


def test_requests_in_a_batch_are_answered_as_each_alone(engine):
    contents = [*TURNS, *OTHERS]
    lengths = [5, 9, 3, 12, 1, 7]
    with Scheduler(engine, max_batch=4, piece=6) as scheduler:
        tickets = [scheduler.submit(job_of(engine, c, n)) for c, n in zip(contents, lengths, strict=True)]
        for ticket, content, length in zip(tickets, contents, lengths, strict=True):
            *pieces, end = ticket
            alone = Conversation(engine)
            answer = alone.generate(content, Sampling(length))
            assert end.answer == answer and "".join(pieces) == answer.text
            assert_same_memory(end.memory, alone.memory, TOLERANCE)
    assert scheduler.counters.completed == 6 and scheduler.counters.step_rows > scheduler.counters.steps


def test_invalid_requests_raise_before_they_are_queued(engine):
    memory = empty_memory(engine)
    poisoned = StoredMemory({i: np.full_like(s, np.nan) for i, s in memory.states.items()}, {}, memory.adapter)
    with Scheduler(engine) as scheduler:
        for error, job in (
            (MemoryStateError, job_of(engine, "hello", memory=poisoned)),
            (MemoryStateError, job_of(engine, "hello", memory=StoredMemory(memory.states, {}, "other"))),
            (DataError, Job("a", memory, (Token(10**6, True),))),
            (DataError, Job("a", memory, (Token(-1, True),))),
            (ConfigError, Job("a", memory, ())),
            (ConfigError, Job("a", memory, (Token(7, True),) * 512)),
        ):
            with pytest.raises(error):
                scheduler.submit(job)
        assert scheduler.submit(job_of(engine, "hello")).result().answer.tokens


def test_late_and_cancelled_requests_leave_the_batch(engine):
    with Scheduler(engine, max_batch=2, max_queue=3) as scheduler:
        long = [scheduler.submit(job_of(engine, c, 400)) for c in TURNS[:2]]
        for ticket in long:
            next(iter(ticket))  # it answers
        late = scheduler.submit(job_of(engine, "hello", deadline=0.0))
        with pytest.raises(DeadlineExceeded):
            late.result()
        waiting = [scheduler.submit(job_of(engine, "hello")) for _ in range(3)]
        with pytest.raises(QueueFull):
            scheduler.submit(job_of(engine, "hello"))
        for ticket in (*long, waiting[0]):
            ticket.cancel()
            with pytest.raises(Cancelled):
                ticket.result()
        expected = Conversation(engine).generate("hello", Sampling(8))
        assert [ticket.result().answer for ticket in waiting[1:]] == [expected] * 2


def test_closing_answers_or_rejects_every_request(engine):
    scheduler = Scheduler(engine, max_batch=1)
    tickets = [scheduler.submit(job_of(engine, c)) for c in TURNS]
    scheduler.close(drain=True)
    assert all(ticket.result().answer.tokens for ticket in tickets)
    scheduler = Scheduler(engine, max_batch=1)
    tickets = [scheduler.submit(job_of(engine, c, 400)) for c in TURNS]
    scheduler.close()
    for ticket in tickets:
        with pytest.raises(Cancelled):
            ticket.result()
    with pytest.raises(Cancelled):
        scheduler.submit(job_of(engine, "hello"))

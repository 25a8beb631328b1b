"""A problem of one request does not affect others: NaN, a failing model, a long prompt, a tenant with many requests."""

from __future__ import annotations

import asyncio
import dataclasses
from dataclasses import replace
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
from serve.batching.alone import answered_alone
from serve.batching.conftest import torch_engine
from serve.batching.test_scheduler import job_of

from deltamem_tool.chat.conversation import Conversation
from deltamem_tool.chat.sampling import Sampling
from deltamem_tool.errors import DeltaMemError
from deltamem_tool.memory.file import StoredMemory
from deltamem_tool.serve.batching.job import Cancelled
from deltamem_tool.serve.batching.scheduler import Scheduler


@pytest.fixture
def engine():
    engine = torch_engine("token")
    engine.stop_tokens = frozenset()
    return engine


def huge(memory: StoredMemory) -> StoredMemory:
    """A memory of finite numbers that overflow in the model."""
    return replace(memory, states={i: np.full_like(state, 3e38) for i, state in memory.states.items()})


def test_a_row_that_overflows_ends_only_its_request(engine):
    sound = [job_of(engine, content, 30) for content in ("hello there", "my cat is Bella", "no")]
    with Scheduler(engine) as scheduler:
        tickets = [scheduler.submit(job) for job in sound]
        for ticket in tickets:
            next(iter(ticket))
        poisoned = job_of(engine, "hello", memory=huge(sound[0].memory))
        with pytest.raises(DeltaMemError, match="NaN or infinity"):
            scheduler.submit(poisoned).result()
        for ticket, job in zip(tickets, sound, strict=True):
            assert list(ticket.result().answer.tokens) == answered_alone(engine, job)[0]
    assert scheduler.counters.failed == 1 and scheduler.counters.cache_bytes == 0


def test_a_row_that_overflows_during_its_answer_ends_only_its_request(engine, monkeypatch):
    """Its logits in the group are replaced from some step on."""
    jobs = [job_of(engine, content, 20) for content in ("hello there", "my cat is Bella", "no")]
    with Scheduler(engine) as scheduler:
        group = scheduler._group
        step = group.step

        def poisoned(tokens):
            logits = step(tokens).copy()
            if scheduler.counters.steps > 5 and len(tokens) == 3:
                logits[1] = np.nan
            return logits

        monkeypatch.setattr(group, "step", poisoned)
        first, bad, last = (scheduler.submit(job) for job in jobs)
        with pytest.raises(DeltaMemError, match="NaN or infinity"):
            bad.result()
        for ticket, job in ((first, jobs[0]), (last, jobs[2])):
            assert list(ticket.result().answer.tokens) == answered_alone(engine, job)[0]


def test_a_failed_model_call_ends_the_batch_and_serves_the_next(engine, monkeypatch):
    job = job_of(engine, "hello there", 40)
    with Scheduler(engine, max_batch=2) as scheduler:
        batch = [scheduler.submit(job) for _ in range(2)]
        for ticket in batch:
            next(iter(ticket))
        waiting = scheduler.submit(job)
        with monkeypatch.context() as patch:
            patch.setattr(scheduler._group, "step", lambda tokens: 1 / 0)
            for ticket in batch:
                with pytest.raises(DeltaMemError, match="The model failed"):
                    ticket.result()
            expected = answered_alone(engine, job)[0]
            assert list(waiting.result().answer.tokens) == expected
        assert list(scheduler.submit(job).result().answer.tokens) == expected


def test_answers_end_before_stop_strings(engine):
    text = Conversation(engine).generate("hello there", Sampling(30)).text
    stop = (text[5:8], "not in it")
    expected = Conversation(engine).generate("hello there", Sampling(30, stop=stop))
    job = job_of(engine, "hello there", 30)
    with Scheduler(engine) as scheduler:
        *pieces, end = scheduler.submit(replace(job, sampling=replace(job.sampling, stop=stop)))
    assert end.answer == expected and expected.why == "stop string"
    assert "".join(pieces) == expected.text == text[: text.index(stop[0])]


def test_coroutines_receive_the_same_answers_as_threads(engine):
    jobs = [job_of(engine, content, 20) for content in ("hello there", "my cat is Bella", "no")]

    async def read(ticket):
        return [event async for event in ticket]

    async def read_all(scheduler):
        abandoned = scheduler.submit(replace(jobs[0], sampling=Sampling(400)))
        async for _ in abandoned:
            abandoned.cancel()
            break
        with pytest.raises(Cancelled):
            await read(abandoned)
        return await asyncio.gather(*(read(scheduler.submit(job)) for job in jobs))

    with Scheduler(engine) as scheduler:
        for (*pieces, end), job in zip(asyncio.run(read_all(scheduler)), jobs, strict=True):
            assert list(end.answer.tokens) == answered_alone(engine, job)[0]
            assert "".join(pieces) == end.answer.text


def test_a_closed_event_loop_does_not_affect_other_requests(engine):
    """The reader of the request was already waiting."""
    job = job_of(engine, "hello there", 300)

    async def begin(ticket):
        async for _ in ticket:
            return

    with Scheduler(engine) as scheduler:
        ticket = scheduler.submit(job)
        asyncio.run(begin(ticket))
        assert scheduler.submit(replace(job, sampling=Sampling(5))).result().answer.tokens


def test_a_long_prompt_is_prefilled_between_the_steps_of_others(engine):
    long = replace(job_of(engine, "hello there"), tokens=job_of(engine, "hello there").tokens * 30)
    counts = []
    with Scheduler(engine, piece=10) as scheduler:
        feed_prompts = scheduler._feed_prompts

        def counting():
            before = dataclasses.replace(scheduler.counters)
            joining = feed_prompts()
            counts.append((scheduler.counters.prompt_tokens - before.prompt_tokens, before.steps))
            return joining

        scheduler._feed_prompts = counting
        other = scheduler.submit(job_of(engine, "no", 200))
        next(iter(other))
        assert list(scheduler.submit(long).result().answer.tokens) == answered_alone(engine, long)[0]
        other.cancel()
    fed = [(tokens, steps) for tokens, steps in counts if tokens][1:]  # without the other's prompt
    assert all(tokens <= 10 for tokens, _ in fed) and sum(tokens for tokens, _ in fed) >= len(long.tokens) - 10
    assert all(later - earlier == 1 for (_, earlier), (_, later) in pairwise(fed))


def test_tenants_take_turns(engine):
    """A tenant does not wait for all the requests of another one."""
    order = []

    def noted(ticket, put, event):
        if not isinstance(event, int):
            order.append(ticket.job.tenant)
        put(event)

    with Scheduler(engine, max_batch=1) as scheduler:
        running = scheduler.submit(job_of(engine, "hello", 300))
        next(iter(running))
        many = [scheduler.submit(job_of(engine, "hello", 1, tenant="many")) for _ in range(6)]
        few = [scheduler.submit(job_of(engine, "hello", 1, tenant=name)) for name in ("b", "c")]
        for ticket in (*many, *few):
            ticket.put = partial(noted, ticket, ticket.put)
        running.cancel()
        for ticket in (*many, *few):
            ticket.result()
    assert order == ["many", "b", "c", "many", "many", "many", "many", "many"]

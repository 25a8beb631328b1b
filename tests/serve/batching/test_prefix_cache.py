"""A prefix shared with an earlier request is not computed again, and the answers do not change."""

from __future__ import annotations

import random
import time
from dataclasses import replace

import pytest
from helpers.hybrids import hybrid
from helpers.tiny import tiny_tokenizer
from serve.batching.alone import answered_alone, assert_close, random_memory
from serve.batching.conftest import torch_engine

from deltamem_tool.chat.generation import Token
from deltamem_tool.chat.sampling import Sampling
from deltamem_tool.chat.torch_engine import TorchModel
from deltamem_tool.serve.batching.job import Job
from deltamem_tool.serve.batching.prefix_cache import PrefixCache
from deltamem_tool.serve.batching.running_job import RunningJob
from deltamem_tool.serve.batching.scheduler import Scheduler
from deltamem_tool.serve.batching.ticket import Bell, Ticket

PIECE = 8


@pytest.fixture(scope="module")
def engine():
    return torch_engine("token")


def prompt(engine, length: int, **changes) -> Job:
    """A prompt of the first tokens of a fixed text, from a fixed memory."""
    chance = random.Random(0)
    memory, ids = random_memory(engine, chance), sorted(engine.text.ids - engine.stop_tokens)
    tokens = [Token(chance.choice(ids), chance.random() < 0.8) for _ in range(64)]
    if engine.memory_shape.segment_width:
        tokens = [token._replace(ends=token.writes and chance.random() < 0.2) for token in tokens]
    return replace(Job("a", memory, tuple(tokens[:length]), Sampling(6), prefix_key="a"), **changes)


def assert_same_with_cache(engine, lengths, cached) -> None:
    """Send prompts sequentially. Check how many tokens of each are cached, and that the cache changes no answer."""
    jobs = [prompt(engine, length) for length in lengths]
    with Scheduler(engine, piece=PIECE) as scheduler, Scheduler(engine, piece=PIECE, cache_bytes=0) as plain:
        ends = [scheduler.submit(job).result() for job in jobs]
        expected = [plain.submit(job).result() for job in jobs]
    assert [end.cached_tokens for end in ends] == cached
    assert [end.cached_tokens for end in expected] == [0] * len(jobs)
    for end, other, job in zip(ends, expected, jobs, strict=True):
        assert end.answer == other.answer
        assert end.memory.digest() == other.memory.digest()  # bit for bit
        tokens, memory = answered_alone(engine, job)
        assert list(end.answer.tokens) == tokens
        assert_close(end.memory, memory)


@pytest.mark.slow
def test_answers_with_cache_hits_are_bit_identical(any_engine):
    """Covers longer, shorter and equal prompts, prompts up to the end of a piece, and shorter than a piece."""
    assert_same_with_cache(any_engine, [30, 50, 20, 20, 64, 17, 16, 8, 9], [0, 24, 16, 16, 48, 16, 8, 0, 8])


@pytest.mark.slow
def test_a_hybrid_reuses_only_whole_prefixes(any_hybrid):
    assert_same_with_cache(any_hybrid, [30, 50, 20, 30, 22], [0, 24, 0, 24, 16])


@pytest.fixture(params=["lfm2", "qwen3_5_text"])
def any_hybrid(request):
    tokenizer = tiny_tokenizer()
    return TorchModel(hybrid(request.param, tokenizer), tokenizer)


def test_a_different_prefix_is_not_a_hit(engine):
    job = prompt(engine, 30)
    first, *rest = job.tokens
    with Scheduler(engine, piece=PIECE) as scheduler:
        scheduler.submit(job).result()
        for other in (
            replace(job, memory=random_memory(engine, random.Random(1))),
            replace(job, prefix_key="b"),
            replace(job, prefix_key=None),
            replace(job, tokens=(first._replace(writes=not first.writes), *rest)),
            replace(job, tokens=(first._replace(id=first.id + 1), *rest)),
        ):
            assert scheduler.submit(other).result().cached_tokens == 0
        assert scheduler.submit(replace(job, tenant="b")).result().cached_tokens == 24


def test_the_least_recently_used_entries_are_evicted_first(engine):
    jobs = [prompt(engine, 30, memory=random_memory(engine, random.Random(seed))) for seed in range(3)]
    with Scheduler(engine, piece=PIECE) as scheduler:
        scheduler.submit(jobs[0]).result()
        one = scheduler.counters.cache_bytes
        scheduler.submit(prompt(engine, 40)).result()  # replaces its own prefix
        assert one < scheduler.counters.cache_bytes
    with Scheduler(engine, piece=PIECE, cache_bytes=2 * one) as scheduler:
        hits = [scheduler.submit(jobs[i]).result().cached_tokens > 0 for i in (0, 1, 0, 2, 0, 1)]
        assert hits == [False, False, True, False, True, False]
        assert scheduler.counters.cache_bytes == 2 * one


def test_deleted_entries_are_computed_again(engine):
    """No part of the entry stays in the cache; other entries do."""
    job, other = prompt(engine, 30), prompt(engine, 30, memory=random_memory(engine, random.Random(1)))
    jobs = [
        replace(job, names=frozenset({"anna", "resp_1"})),
        replace(other, names=frozenset({"ben"})),
        replace(job, tenant="b", prefix_key="b", names=frozenset({"anna"})),
    ]
    with Scheduler(engine, piece=PIECE) as scheduler:
        for each in jobs:
            scheduler.submit(each).result()
        before = scheduler.counters.cache_bytes
        scheduler.forget("a", ["anna", "nobody"])
        until = time.monotonic() + 20
        while scheduler.counters.cache_bytes == before:
            assert time.monotonic() < until
            time.sleep(0.01)
        assert scheduler.counters.cache_bytes == before * 2 // 3
        assert [scheduler.submit(each).result().cached_tokens for each in jobs] == [0, 24, 24]


def test_deleting_while_a_job_waits_leaves_nothing_in_the_cache(engine):
    job = prompt(engine, 30, names=frozenset({"anna"}))
    other = prompt(engine, 30, memory=random_memory(engine, random.Random(1)), names=frozenset({"ben"}))
    with Scheduler(engine, piece=PIECE) as scheduler:
        with scheduler._changed:  # so that none of them has joined the batch
            tickets = [scheduler.submit(each) for each in (job, other)]
            scheduler.forget("a", ["anna"])
        for ticket in tickets:
            ticket.result()
        assert [scheduler.submit(each).result().cached_tokens for each in (job, other)] == [0, 24]


def test_deleting_during_a_prefill_leaves_nothing_in_the_cache(engine):
    job = prompt(engine, 60, names=frozenset({"anna"}))
    running = RunningJob(engine, Ticket(job, engine.text, Bell()), engine.text.ids, PIECE)
    running.begin(engine, PrefixCache(engine, PIECE, 2**20))
    for fed in range(3):
        if fed == 1:
            assert running.prefix is not None
            running.forget("b", "anna")
            running.forget("a", "ben")
            assert running.prefix is not None
            running.forget("a", "anna")
        running.feed_piece(engine)
    assert running.prefix is None

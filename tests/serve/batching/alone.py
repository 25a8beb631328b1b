"""The answer that a request would get alone, by a simple loop; and random requests."""

from __future__ import annotations

import random

import numpy as np
from helpers.conversations import TOLERANCE

from deltamem_tool.chat.engine import Engine, empty_memory
from deltamem_tool.chat.generation import Token
from deltamem_tool.chat.sampling import Sampler, Sampling, token_mask
from deltamem_tool.memory.file import StoredMemory
from deltamem_tool.serve.batching.job import Job


def assert_close(actual: StoredMemory, expected: StoredMemory) -> None:
    tensors = actual.tensors()
    assert tensors.keys() == expected.tensors().keys() and actual.adapter == expected.adapter
    for name, tensor in expected.tensors().items():
        np.testing.assert_allclose(tensors[name], tensor, rtol=0, atol=TOLERANCE * max(1, abs(tensor).max()))


def answered_alone(engine: Engine, job: Job) -> tuple[list[int], StoredMemory]:
    """The answer's tokens, with one that ended it, and the memory after all that was fed; there are no stop strings."""
    past, context, answer = engine.start(job.memory), 0, list[int]()
    valid = token_mask(engine.text.ids | engine.stop_tokens)
    sampler = Sampler(job.sampling, np.array([token.id for token in job.tokens]), valid)
    new = list(job.tokens)
    while True:
        ids, writes, ends = (np.array([column]) for column in zip(*new, strict=True))
        context += len(new)
        segment_end = ends if engine.memory_shape.segment_width else None
        logits, past = engine.step(past, ids, np.ones((1, context), np.int64), writes, segment_end)
        answer.append(sampler.pick(logits[0]))
        if answer[-1] in engine.stop_tokens or len(answer) == job.sampling.max_new_tokens:
            return answer, engine.memory(past)
        new = [Token(answer[-1], job.answer_writes)]


def random_memory(engine: Engine, chance: random.Random) -> StoredMemory:
    """States of one row, and where the adapter has segments, an open one."""
    numbers, empty = np.random.default_rng(chance.randrange(2**32)), empty_memory(engine)
    states, segments = (
        {layer: numbers.normal(0, 0.3, array.shape).astype(np.float32) for layer, array in part.items()}
        for part in (empty.states, empty.open_segments)
    )
    for segment in segments.values():
        segment[:, -1] = 3  # tokens in it
    return StoredMemory(states, segments, engine.adapter)


def random_job(engine: Engine, chance: random.Random, longest: int = 40) -> Job:
    """Any prompt, some tokens of which write and some of which end a segment; greedy or sampled."""
    ids = sorted(engine.text.ids - engine.stop_tokens)
    tokens = [Token(chance.choice(ids), chance.random() < 0.8) for _ in range(chance.randint(1, longest))]
    if engine.memory_shape.segment_width:
        tokens = [token._replace(ends=token.writes and chance.random() < 0.2) for token in tokens]
    options = {"temperature": 1.0, "seed": chance.randrange(100)} if chance.random() < 0.4 else {}
    return Job(
        tenant=chance.choice("abc"),
        memory=random_memory(engine, chance),
        tokens=tuple(tokens),
        sampling=Sampling(chance.randint(1, longest), **options),
        answer_writes=chance.random() < 0.8,
    )

"""Continuous batching: a thread owns the engine and runs one step at a time for all current rows."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from numpy.typing import NDArray

from deltamem_tool.chat.engine import Engine
from deltamem_tool.chat.sampling import GreedySampler, token_mask
from deltamem_tool.errors import DeltaMemError, domain_error, first_line
from deltamem_tool.memory.file import StoredMemory
from deltamem_tool.serve.batching.fair_queue import FairQueue
from deltamem_tool.serve.batching.job import Cancelled, DeadlineExceeded, Job
from deltamem_tool.serve.batching.prefix_cache import PrefixCache
from deltamem_tool.serve.batching.running_job import RunningJob
from deltamem_tool.serve.batching.ticket import Bell, Ticket

MAX_BATCH = 32
MAX_QUEUE = 256
PIECE = 128  # tokens
CACHE_BYTES = 256 * 2**20


@dataclass
class Counters:
    """The current and the total work of a scheduler. Only its thread writes them."""

    waiting: int = 0
    running: int = 0
    completed: int = 0
    cancelled: int = 0
    late: int = 0
    failed: int = 0
    prompt_tokens: int = 0  # that were computed
    cached_tokens: int = 0  # of prompts; taken from the cache
    cache_bytes: int = 0
    answer_tokens: int = 0  # of completed answers
    steps: int = 0  # of decoding
    step_rows: int = 0  # sum over all steps
    step_seconds: float = 0.0
    model_seconds: float = 0.0  # of these, in the engine


class Scheduler:
    """Answers jobs in one batch, which jobs join and leave between any two steps.

    Each answer is the same as if it ran alone. Prompts are fed in pieces between steps, so that a long prompt does not
    keep other jobs waiting.

    Args:
        engine: the model. Only the scheduler's thread calls it.
        max_batch: maximum number of rows in the batch.
        max_queue: maximum number of waiting jobs.
        piece: approximate number of prompt tokens to feed between two steps.
        cache_bytes: size of the cache for prompts with a common prefix: see `Job.prefix_key`.
    """

    def __init__(
        self,
        engine: Engine,
        max_batch: int = MAX_BATCH,
        max_queue: int = MAX_QUEUE,
        piece: int = PIECE,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self.engine = engine
        self.counters = Counters()
        self._ids = engine.text.ids | engine.stop_tokens
        self._valid = token_mask(self._ids)
        self._greedy = GreedySampler(self._valid)
        self._max_batch, self._piece = max_batch, piece
        self._waiting = FairQueue(max_queue)
        self._changed = threading.Condition()  # guards the queue and the next three attributes
        self._forgotten: list[tuple[str, str]] = []  # tenants and names
        self._open = True  # accepts new jobs
        self._ending = False  # ends current jobs without an answer
        self._prompts: list[RunningJob] = []  # rows whose prompts are not completely fed
        self._answering: list[RunningJob] = []  # the rows of the group
        self._leaving: set[int] = set()  # indices of these rows that have ended
        self._group = engine.group()
        self._bell = Bell()
        self._cache = PrefixCache(engine, piece, cache_bytes)
        self._thread = threading.Thread(target=self._run, name="deltamem-scheduler", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> Ticket:
        """Accept a job.

        Raises:
            QueueFull: too many jobs are waiting.
            Cancelled: the scheduler is closed.
            DeltaMemError: the job cannot be run: see `Job.check`.
        """
        job.check(self.engine, self._ids)
        ticket = Ticket(job, self.engine.text, self._bell)
        with self._changed:
            if not self._open:
                raise _closed_error()
            self._waiting.put(ticket)
            self.counters.waiting = len(self._waiting)
            self._changed.notify()
        return ticket

    def forget(self, tenant: str, names: Iterable[str]) -> None:
        """Drop the cached prompts of jobs with these names, before the next step, and cache none of those that wait."""
        with self._changed:
            for name in names:
                self._forgotten.append((tenant, name))
                self._waiting.forget(tenant, name)
            self._changed.notify()

    def close(self, drain: bool = False) -> None:
        """End the thread: at the next step, or with `drain`, when every accepted job has ended."""
        with self._changed:
            self._open, self._ending = False, not drain
            self._changed.notify()
        self._thread.join()

    def __enter__(self) -> Scheduler:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _run(self) -> None:
        while self._admit():
            try:
                joining = self._feed_prompts()
                self._bell.ring()  # readers work while the engine does
                self._decode(joining)
            except Exception as error:  # ONNX Runtime's have no common base, and a dead thread would answer nobody
                self._fail(error)
            self._bell.ring()
        self._bell.ring()

    def _admit(self) -> bool:
        """Wait for work, end the tickets that are over, and admit waiting ones. Return whether to go on."""
        with self._changed:
            while self._open and not (self._waiting or self._prompts or self._answering or self._forgotten):
                self.counters.running = 0
                self._changed.wait()
            ending, now = self._ending, time.monotonic()
            over = self._waiting.sweep(math.inf if ending else now)
            room = self._max_batch - len(self._prompts) - len(self._answering) + len(self._leaving)
            new = [self._waiting.pop() for _ in range(min(room, len(self._waiting)))]
            self.counters.waiting = len(self._waiting)
            forgotten, self._forgotten = self._forgotten, []
        for tenant, name in forgotten:
            self._cache.forget(tenant, name)
            for running in self._prompts:
                running.forget(tenant, name)
            self.counters.cache_bytes = self._cache.size
        for ticket in over:
            self._end(ticket, self._reason(ticket))
        if new:
            self._prompts += [RunningJob(self.engine, ticket, self._valid, self._piece) for ticket in new]
        for running in [running for running in self._prompts if ending or running.ticket.is_over(now)]:
            self._prompts.remove(running)
            self._end(running.ticket, self._reason(running.ticket))
        for number, running in enumerate(self._answering):
            if (ending or running.ticket.is_over(now)) and number not in self._leaving:
                self._leaving.add(number)
                self._end(running.ticket, self._reason(running.ticket))
        self.counters.running = len(self._prompts) + len(self._answering) - len(self._leaving)
        return self._open or bool(self._prompts or self._answering or self.counters.waiting)

    def _feed_prompts(self) -> list[RunningJob]:
        """Feed about `piece` tokens of prompts, in order of arrival. Return the rows that start to answer."""
        fed, joining = 0, list[RunningJob]()
        while self._prompts and fed < self._piece:
            prompts = self._next_prompts()
            if not prompts[0].is_short and prompts[0].row.past is None:
                prompts[0].begin(self.engine, self._cache)
                self.counters.cached_tokens += prompts[0].cached
            before = sum(running.row.fed for running in prompts)
            if prompts[0].is_short:
                logits = RunningJob.feed_short(self.engine, prompts)
            else:
                logits = self._feed_piece(prompts[0])
            fed += sum(running.row.fed for running in prompts) - before
            for running, of_row in zip(prompts, logits, strict=True):
                if running.row.fed == running.row.prompt:
                    self._prompts.remove(running)
                    if self._choose(running, of_row, None, partial(running.past_row.memory, self.engine)):
                        joining.append(running)
        self.counters.prompt_tokens += fed
        return joining

    def _next_prompts(self) -> Sequence[RunningJob]:
        """The first prompt and, if it is short, the short prompts after it that fit into one piece."""
        prompts, longest = list[RunningJob](), 0
        for running in self._prompts:
            longest = max(longest, running.row.prompt)
            if prompts and not (running.is_short and longest * (len(prompts) + 1) <= self._piece):
                break
            prompts.append(running)
            if not running.is_short:
                break
        return prompts

    def _feed_piece(self, running: RunningJob) -> NDArray[Any]:
        """Feed a piece of a long prompt, and return the logits `[1, V]` after it."""
        logits = running.feed_piece(self.engine)
        prefix = running.prefix
        if prefix is not None and running.row.fed == running.row.prompt and math.isfinite(logits.max()):
            self._cache.put(prefix)
            self.counters.cache_bytes = self._cache.size
        return logits

    def _decode(self, joining: Sequence[RunningJob]) -> None:
        """Generate one token for each answering row."""
        self._exchange(joining)
        if not self._answering:
            return
        began = time.perf_counter()
        logits = self._group.step([running.row.tokens[-1] for running in self._answering])
        self.counters.model_seconds += time.perf_counter() - began
        likeliest = self._greedy.pick(logits)
        for number, (running, token) in enumerate(zip(self._answering, likeliest, strict=True)):
            running.row.fed += 1
            if not self._choose(running, logits[number], token, partial(self._group.memory, number)):
                self._leaving.add(number)
        self.counters.steps += 1
        self.counters.step_rows += len(logits)
        self.counters.step_seconds += time.perf_counter() - began

    def _exchange(self, joining: Sequence[RunningJob]) -> None:
        """Let rows leave and join the group."""
        if not self._leaving and not joining:
            return
        parts = [running.past_row for running in joining]
        for running in joining:
            running.row.past = None
            del running.past_row
        places = self._group.exchange(self._leaving, parts)
        self._answering = [*(self._answering[place] for place in places), *joining]
        self._leaving.clear()

    def _choose(
        self,
        running: RunningJob,
        logits: NDArray[Any],
        likeliest: int | None,
        memory: Callable[[], StoredMemory],
    ) -> bool:
        """Choose the next token of a row, as in `RunningJob.take`. Return whether the answer continues.

        `memory` returns the memory of the row at its end.
        """
        try:
            if running.take(logits, likeliest, self.engine.stop_tokens):
                return True
        except DeltaMemError as error:
            self._end(running.ticket, error)
            return False
        completion = running.completion(memory())
        self.counters.completed += 1
        self.counters.answer_tokens += len(completion.answer.tokens)
        running.ticket.put(completion)
        return False

    def _fail(self, error: Exception) -> None:
        """End all jobs in the batch with `error`. Waiting jobs are not affected."""
        answering = (running for number, running in enumerate(self._answering) if number not in self._leaving)
        for running in (*self._prompts, *answering):
            self._end(running.ticket, domain_error(error) or _model_error(error))
        self._prompts, self._answering, self._group = [], [], self.engine.group()
        self._leaving.clear()

    def _reason(self, ticket: Ticket) -> DeltaMemError:
        """The error with which a ticket ends."""
        if ticket.is_cancelled:
            return Cancelled("The request was cancelled.", "", "Nothing of it was stored.")
        if self._ending:
            return _closed_error()
        return DeadlineExceeded(
            "The request was not answered in time.", "Its deadline has passed.", "Nothing of it was stored. Try again."
        )

    def _end(self, ticket: Ticket, error: DeltaMemError) -> None:
        """End a ticket without an answer."""
        if isinstance(error, Cancelled):
            self.counters.cancelled += 1
        elif isinstance(error, DeadlineExceeded):
            self.counters.late += 1
        else:
            self.counters.failed += 1
        ticket.put(error)


def _closed_error() -> Cancelled:
    return Cancelled("The server is shutting down.", "It accepts no more requests.", "Try again once it is running.")


def _model_error(error: Exception) -> DeltaMemError:
    return DeltaMemError("The model failed.", f"{first_line(error)}.", "Nothing of the request was stored. Try again.")

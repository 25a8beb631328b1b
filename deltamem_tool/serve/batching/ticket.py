"""A job from the moment it is accepted: its events come out as they happen, for a thread or for a coroutine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from queue import Empty, SimpleQueue

from deltamem_tool.errors import DeltaMemError
from deltamem_tool.serve.batching.job import Completion, Job

Event = str | Completion  # pieces of the answer's text, and then the end


class Ticket:
    """A job's events, which one reader iterates over: `for event in ticket` or `async for event in ticket`.

    The last one is a `Completion`. A job that ends otherwise raises `Cancelled`, `DeadlineExceeded`, or what is wrong
    with it.

    Args:
        job: what was accepted.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.submitted = time.monotonic()
        self._events: SimpleQueue[Event | DeltaMemError] = SimpleQueue()
        self._wake: Callable[[], object] | None = None
        self._cancelled = False

    @property
    def cancelled(self) -> bool:
        """Whether nobody waits for it any longer."""
        return self._cancelled

    def cancel(self) -> None:
        """Leave the queue, or the batch at the next step. Without effect on a job that has ended."""
        self._cancelled = True

    def result(self) -> Completion:
        """The end, when it comes."""
        *_, last = self
        assert isinstance(last, Completion)
        return last

    def __iter__(self) -> Iterator[Event]:
        while True:
            event = self._events.get()
            if isinstance(event, DeltaMemError):
                raise event
            yield event
            if isinstance(event, Completion):
                return

    async def __aiter__(self) -> AsyncIterator[Event]:
        arrived, loop = asyncio.Event(), asyncio.get_running_loop()
        self._wake = lambda: loop.call_soon_threadsafe(arrived.set)
        while True:
            arrived.clear()  # before the queue is read: what comes after that wakes again
            for event in self._waiting():
                if isinstance(event, DeltaMemError):
                    raise event
                yield event
                if isinstance(event, Completion):
                    return
            await arrived.wait()

    def _waiting(self) -> Iterator[Event | DeltaMemError]:
        while True:
            try:
                yield self._events.get_nowait()
            except Empty:
                return

    def put(self, event: Event | DeltaMemError) -> None:
        """Add an event; an error is the last one. Called by the scheduler."""
        self._events.put(event)
        if self._wake is None:
            return
        try:
            self._wake()
        except RuntimeError:  # the reader's loop is closed
            self._cancelled = True

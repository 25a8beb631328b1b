"""A job from the moment it is accepted: its events come out as they happen, for a thread or for a coroutine."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from queue import Empty, SimpleQueue

from deltamem_tool.chat.generation import AnswerStream
from deltamem_tool.chat.text import ChatText
from deltamem_tool.errors import DeltaMemError
from deltamem_tool.serve.batching.job import Completion, Job

Event = str | Completion  # pieces of the answer's text, and then the end


class Bell:
    """Wakes coroutines that wait for events: one call for all of a loop, which many calls would keep busy."""

    def __init__(self) -> None:
        self._waiting: dict[asyncio.AbstractEventLoop, list[asyncio.Event]] = {}

    def add(self, loop: asyncio.AbstractEventLoop, arrived: asyncio.Event) -> None:
        """Wake who waits for `arrived` at the next ring."""
        self._waiting.setdefault(loop, []).append(arrived)

    def ring(self) -> None:
        """Wake them."""
        for loop, events in self._waiting.items():
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(_set_all, events)
        self._waiting = {}


def _set_all(events: Sequence[asyncio.Event]) -> None:
    for event in events:
        event.set()


class Ticket:
    """A job's events, which one reader iterates over: `for event in ticket` or `async for event in ticket`.

    The last one is a `Completion`. A job that ends otherwise raises `Cancelled`, `DeadlineExceeded`, or what is wrong
    with it.

    Tokens become text where they are read, while the scheduler's thread goes on; but for answers with stop strings,
    whose text says when they end.

    Args:
        job: what was accepted.
        text: of the model.
        bell: of the scheduler.
    """

    def __init__(self, job: Job, text: ChatText, bell: Bell) -> None:
        self.job = job
        self.submitted = time.monotonic()
        self._deadline = math.inf if job.deadline is None else job.deadline
        self._bell = bell
        self._reader: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None
        self._events: SimpleQueue[int | Event | DeltaMemError] = SimpleQueue()
        self._text = text
        self._cancelled = False

    @property
    def cancelled(self) -> bool:
        """Whether nobody waits for it any longer."""
        return self._cancelled

    def gone(self, now: float) -> bool:
        """Whether it was cancelled, or is late at `now`."""
        return self._cancelled or now >= self._deadline

    def cancel(self) -> None:
        """Leave the queue, or the batch at the next step. Without effect on a job that has ended."""
        self._cancelled = True

    def result(self) -> Completion:
        """The end, when it comes."""
        *_, last = self
        assert isinstance(last, Completion)
        return last

    def put(self, event: int | Event | DeltaMemError) -> None:
        """Add a token, a piece of text, or the end. For the scheduler, which rings the bell."""
        self._events.put(event)
        if self._reader is not None:
            self._bell.add(*self._reader)

    def __iter__(self) -> Iterator[Event]:
        reading = _Reading(self._text)
        while not reading.ended:
            yield from reading.take(self._events.get())

    async def __aiter__(self) -> AsyncIterator[Event]:
        reading, arrived = _Reading(self._text), asyncio.Event()
        self._reader = asyncio.get_running_loop(), arrived
        while not reading.ended:
            arrived.clear()  # before the queue is read: what comes after that wakes again
            for event in self._waiting():
                for piece in reading.take(event):
                    yield piece
            if not reading.ended:
                await arrived.wait()

    def _waiting(self) -> Iterator[int | Event | DeltaMemError]:
        while True:
            try:
                yield self._events.get_nowait()
            except Empty:
                return


class _Reading:
    """What a reader makes of events."""

    def __init__(self, text: ChatText) -> None:
        self._given: list[str] = []  # pieces of text
        self._stream = AnswerStream(text, (), self._given.append)
        self.ended = False

    def take(self, event: int | Event | DeltaMemError) -> list[Event]:
        """The events that `event` becomes."""
        before = len(self._given)
        if isinstance(event, int):
            self._stream.push(event)
        elif isinstance(event, str):
            self._given.append(event)
        else:
            self.ended = True
            if isinstance(event, DeltaMemError):
                raise event
            self._stream.end()
            answer = replace(event.answer, text="".join(self._given))
            return [*self._given[before:], replace(event, answer=answer)]
        return [*self._given[before:]]

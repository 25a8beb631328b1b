"""An accepted job, whose events can be read by a thread or a coroutine as they happen."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from queue import Empty, SimpleQueue

from deltamem_tool.chat.text import ChatText, TextStream
from deltamem_tool.errors import DeltaMemError
from deltamem_tool.serve.batching.job import Completion, Job

Event = int | str | Completion | DeltaMemError  # tokens or pieces of text, and then the end
Readers = dict[asyncio.AbstractEventLoop, set[asyncio.Event]]
# Pause between two pieces of a text. A small model generates tokens faster than anybody reads, and sending each token
# separately costs as much time as computing it. If other programs use the CPU, wall-clock time does not show how much
# was computed. A piece, which costs about 60 µs, therefore also waits for PIECE_WORK per reader, or the longest pause.
PIECE_SECONDS = 0.04
PIECE_WORK = 0.00125  # seconds of CPU time per reader
LONGEST_PIECE_SECONDS = 0.2


class Bell:
    """Wakes coroutines that wait for events, with one call per event loop instead of many."""

    def __init__(self) -> None:
        self._at_once: Readers = {}
        self._patient: Readers = {}
        self._rung = self._worked = -math.inf  # wall-clock and CPU time of the last ring for the patient

    def add(self, loop: asyncio.AbstractEventLoop, arrived: asyncio.Event, at_once: bool) -> None:
        """Set `arrived` at the next ring, or, without `at_once`, at the first ring after a pause."""
        readers = self._at_once if at_once else self._patient
        readers.setdefault(loop, set()).add(arrived)

    def ring(self) -> None:
        """Wake the waiting coroutines."""
        woken, self._at_once = [self._at_once], {}
        now, work = time.monotonic(), time.process_time()
        if self._have_waited(now - self._rung, work - self._worked):
            woken.append(self._patient)
            self._patient, self._rung, self._worked = {}, now, work
        for readers in woken:
            for loop, events in readers.items():
                with suppress(RuntimeError):  # the loop is closed
                    loop.call_soon_threadsafe(_set_all, events)

    def _have_waited(self, seconds: float, work: float) -> bool:
        """Whether the patient have waited for long enough."""
        enough = PIECE_WORK * sum(map(len, self._patient.values()))
        return seconds >= PIECE_SECONDS and (work >= enough or seconds >= LONGEST_PIECE_SECONDS)


def _set_all(events: Iterable[asyncio.Event]) -> None:
    for event in events:
        event.set()


class Ticket:
    """The events of a job, for one reader: `for event in ticket` or `async for event in ticket`.

    The last event is a `Completion`. If the job ends otherwise, iterating raises `Cancelled`, `DeadlineExceeded`, or
    the error of the job.

    Tokens become text in the reader, while the scheduler's thread goes on. Answers with stop strings are an exception,
    because their text decides when they end. If a job is not streamed, its reader is woken only at the end.

    Args:
        job: the accepted job.
        text: tokenizer of the model.
        bell: bell of the scheduler.
    """

    def __init__(self, job: Job, text: ChatText, bell: Bell) -> None:
        self.job = job
        self.submitted = time.monotonic()
        self._deadline = math.inf if job.deadline is None else job.deadline
        self._bell = bell
        self._reader: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None
        self._events: SimpleQueue[Event] = SimpleQueue()
        self._is_new = True  # nothing has happened yet
        self._text = text
        self._cancelled = False

    @property
    def is_cancelled(self) -> bool:
        """Whether nobody waits for the job any longer."""
        return self._cancelled

    def is_over(self, now: float) -> bool:
        """Return whether the job was cancelled, or is past its deadline at `now`."""
        return self._cancelled or now >= self._deadline

    def cancel(self) -> None:
        """Leave the queue, or leave the batch at the next step. Has no effect on a job that has ended."""
        self._cancelled = True

    def result(self) -> Completion:
        """Wait for the end and return it."""
        *_, last = self
        assert isinstance(last, Completion)
        return last

    def put(self, event: Event) -> None:
        """Add a token, a piece of text, or the end. Only for the scheduler, which rings the bell."""
        self._events.put(event)
        if self._reader is not None:
            self._bell.add(*self._reader, at_once=self._is_new or not isinstance(event, int | str))
        self._is_new = False

    def __iter__(self) -> Iterator[str | Completion]:
        reading = _EventReader(self._text)
        while reading.end is None:
            if text := reading.take((self._events.get(), *self._new_events())):
                yield text
        yield reading.completion()

    async def __aiter__(self) -> AsyncIterator[str | Completion]:
        reading, arrived = _EventReader(self._text), asyncio.Event()
        self._reader = asyncio.get_running_loop(), arrived
        while True:
            arrived.clear()  # before the queue is read, so that later events wake this coroutine again
            if text := reading.take(self._new_events()):
                yield text
            if reading.end is not None:
                break
            await arrived.wait()
        yield reading.completion()

    def _new_events(self) -> Iterator[Event]:
        while True:
            try:
                yield self._events.get_nowait()
            except Empty:
                return


class _EventReader:
    """Turns the events of a job into text for a reader.

    Attributes:
        end: the last of them, when it has come.
    """

    def __init__(self, text: ChatText) -> None:
        self._stream = TextStream(text.tokenizer)
        self._given: list[str] = []  # pieces of text
        self.end: Completion | DeltaMemError | None = None

    def take(self, events: Iterable[Event]) -> str:
        """Return the text of `events` as one piece."""
        tokens, pieces = list[int](), list[str]()
        for event in events:
            if isinstance(event, int):
                tokens.append(event)
            elif isinstance(event, str):
                pieces.append(event)
            else:
                self.end = event
        if tokens:
            pieces.append(self._stream.push(*tokens))
        if isinstance(self.end, Completion):
            pieces.append(self._stream.flush())
        self._given.append("".join(pieces))
        return self._given[-1]

    def completion(self) -> Completion:
        """Return the completion.

        Raises:
            DeltaMemError: the job ended with this error.
        """
        assert self.end is not None
        if isinstance(self.end, DeltaMemError):
            raise self.end
        text = "".join(self._given)  # as it was given
        return replace(self.end, answer=replace(self.end.answer, text=text)) if text else self.end

"""Faults of a request: another answer, a cut connection, a delay."""

from __future__ import annotations

import json
import random
import threading
from dataclasses import dataclass

from fake_hub.messages import Match, Reply, Request

SOMEWHERE = -1  # a byte chosen at random


@dataclass(frozen=True)
class Fault:
    """Each field is one thing that can go wrong; made by the functions below."""

    reply: Reply | None = None  # instead of doing what is asked
    delay: float = 0.0  # seconds before anything is done
    cut_request: int | None = None  # read so many bytes of the body, then cut; nothing is done
    cut_answer: int | None = None  # do what is asked, send so many bytes of the answer's body, then cut
    unanswered: bool = False  # do what is asked, then cut
    garbled: bool = False  # do what is asked, then answer with a page of somebody else's


def answer(status: int, error: str = "", **headers: str) -> Fault:
    """Refuse with that status: `answer(429, "slow down", Retry_After="3")`."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    body = json.dumps({"error": error}).encode() if error else b""
    return Fault(reply=Reply(status, {"Content-Type": "application/json", **named}, body))


def delay(seconds: float) -> Fault:
    """A slow server."""
    return Fault(delay=seconds)


def cut_request(after: int = SOMEWHERE) -> Fault:
    """The connection breaks while the request's body is on its way: the server never has the whole of it."""
    return Fault(cut_request=after)


def cut_answer(after: int = SOMEWHERE) -> Fault:
    """The connection breaks while the answer's body is on its way; `after=0` is behind the headers. An answer without
    a body, as to HEAD, comes whole."""
    return Fault(cut_answer=after)


def lose_answer() -> Fault:
    """The server does what is asked, and nobody hears of it."""
    return Fault(unanswered=True)


def garble_answer() -> Fault:
    """The server does what is asked, and a proxy answers with a page of its own."""
    return Fault(garbled=True)


class Faults:
    """The faults to come. Of several that match, the one that was asked for first goes first."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._waiting: list[tuple[Match, Fault, int | None]] = []

    def add(self, match: Match, how: Fault, times: int | None) -> None:
        """For the next `times` requests that match; for all of them where it is None."""
        with self._lock:
            self._waiting.append((match, how, times))

    def clear(self) -> None:
        with self._lock:
            self._waiting.clear()

    def take(self, request: Request) -> Fault:
        """The fault of this request, used up; one with which nothing goes wrong if there is none."""
        with self._lock:
            for position, (match, how, times) in enumerate(self._waiting):
                if request.matches(match):
                    if times is not None:
                        left = [(match, how, times - 1)] if times > 1 else []
                        self._waiting[position : position + 1] = left
                    return how
        return Fault()

    def byte(self, wanted: int, size: int) -> int:
        """The position at which to cut `size` bytes, never behind the last one."""
        with self._lock:
            return min(self._random.randrange(max(size, 1)) if wanted == SOMEWHERE else wanted, max(size - 1, 0))

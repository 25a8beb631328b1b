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
    """The faults of a request, one per field. The functions below create them."""

    reply: Reply | None = None  # instead of handling the request
    delay: float = 0.0  # seconds before the request is handled
    cut_request: int | None = None  # cut after this many bytes of the request's body, without handling it
    cut_answer: int | None = None  # handle the request, then cut after this many bytes of the answer's body
    unanswered: bool = False  # handle the request, then cut the connection
    garbled: bool = False  # handle the request, then answer with an unrelated page


def answer(status: int, error: str = "", **headers: str) -> Fault:
    """Answer with this status: `answer(429, "slow down", Retry_After="3")`."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    body = json.dumps({"error": error}).encode() if error else b""
    return Fault(reply=Reply(status, {"Content-Type": "application/json", **named}, body))


def delay(seconds: float) -> Fault:
    """A slow server."""
    return Fault(delay=seconds)


def cut_request(after: int = SOMEWHERE) -> Fault:
    """The connection breaks during the upload, so that the server never gets the whole request body."""
    return Fault(cut_request=after)


def cut_answer(after: int = SOMEWHERE) -> Fault:
    """The connection breaks while the answer's body is on its way; `after=0` is behind the headers. An answer without
    a body, as to HEAD, comes whole."""
    return Fault(cut_answer=after)


def lose_answer() -> Fault:
    """The server handles the request, but the answer is lost."""
    return Fault(unanswered=True)


def garble_answer() -> Fault:
    """The server handles the request, and a proxy answers with its own page."""
    return Fault(garbled=True)


class Faults:
    """The pending faults. If several match a request, the one that was added first applies."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._waiting: list[tuple[Match, Fault, int | None]] = []

    def add(self, match: Match, how: Fault, times: int | None) -> None:
        """Add a fault for the next `times` requests that match, or for all of them if it is None."""
        with self._lock:
            self._waiting.append((match, how, times))

    def clear(self) -> None:
        with self._lock:
            self._waiting.clear()

    def take(self, request: Request) -> Fault:
        """Take the fault for this request, or one without any effect if there is none."""
        with self._lock:
            for position, (match, how, times) in enumerate(self._waiting):
                if request.matches(match):
                    if times is not None:
                        left = [(match, how, times - 1)] if times > 1 else []
                        self._waiting[position : position + 1] = left
                    return how
        return Fault()

    def byte(self, position: int, size: int) -> int:
        """The position at which to cut `size` bytes, never behind the last one."""
        with self._lock:
            return min(self._random.randrange(max(size, 1)) if position == SOMEWHERE else position, max(size - 1, 0))

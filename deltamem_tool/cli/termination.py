"""End a command on SIGTERM and SIGHUP as on Ctrl-C: what was said is kept, and unfinished files are removed."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_received: list[int] = []


def is_terminated() -> bool:
    """Return whether a signal told this program to end, for which a KeyboardInterrupt was raised."""
    return bool(_received)


def termination_signals() -> list[int]:
    """Return the signals that end a command, as many as the operating system has."""
    return [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


@contextmanager
def interrupt_on_signals() -> Iterator[None]:
    """Raise KeyboardInterrupt for each such signal; afterwards exit with 128 plus its number, as shells do.

    A signal that is ignored, as SIGHUP under nohup, stays so.
    """
    if threading.current_thread() is not threading.main_thread():  # only there can signals be caught
        yield
        return
    owner = os.getpid()

    def interrupt(number: int, _: FrameType | None) -> None:
        if os.getpid() != owner:  # a child that was forked off, which its pool ends in this way
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        _received.append(number)
        raise KeyboardInterrupt

    caught = [number for number in termination_signals() if signal.getsignal(number) is signal.SIG_DFL]
    _received.clear()
    for number in caught:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number in caught:
            signal.signal(number, signal.SIG_DFL)
        if _received:
            sys.exit(128 + _received[0])

"""Commit concurrent changes together, so that they wait for the disk only once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError, IntegrityError

from deltamem_tool.serve.store.errors import StoreUnavailable

T = TypeVar("T")
TURN_SECONDS = 30.0  # how long a change waits for others
MAX_TOGETHER = 64


@dataclass(eq=False)
class _Change:
    work: Callable[[Connection], Any]
    value: Any = None
    error: Exception | None = None
    ended: threading.Event = field(default_factory=threading.Event)


class GroupCommit:
    """Runs changes of many threads, one transaction at a time.

    The thread whose turn it is runs all waiting changes in its transaction. Each of them has a savepoint, so that a
    change that raises does not affect the others. None of them returns before the transaction is committed.

    Args:
        transaction: begins a transaction, and commits it at the end of the block.
    """

    def __init__(self, transaction: Callable[[], AbstractContextManager[Connection]]) -> None:
        self._transaction = transaction
        self._turn = threading.Lock()
        self._guard = threading.Lock()  # guards the list
        self._waiting: list[_Change] = []

    def run(self, work: Callable[[Connection], T]) -> T:
        """Run `work` and return its result when it is committed.

        Raises:
            StoreUnavailable: the transaction failed, in this change or another, or the other changes took too long.
                Nothing was changed.
            Exception: any exception of `work`; nothing of it was changed.
        """
        change = _Change(work)
        with self._guard:
            self._waiting.append(change)
        if self._turn.acquire(timeout=TURN_SECONDS):
            try:
                while not change.ended.is_set():
                    self._run_waiting()
            finally:
                self._turn.release()
        elif self._withdraw(change):
            raise _timeout_error()
        change.ended.wait()
        if change.error is not None:
            raise change.error
        value: T = change.value
        return value

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Run no changes during the block.

        Raises:
            StoreUnavailable: other changes took too long.
        """
        if not self._turn.acquire(timeout=TURN_SECONDS):
            raise _timeout_error()
        try:
            yield
        finally:
            self._turn.release()

    def _withdraw(self, change: _Change) -> bool:
        """Remove a change from the queue, unless it is already running. Return whether it was removed."""
        with self._guard:
            waits = change in self._waiting
            if waits:
                self._waiting.remove(change)
        return waits

    def _run_waiting(self) -> None:
        """Run the oldest waiting changes, in the order of their arrival."""
        with self._guard:
            changes, self._waiting = self._waiting[:MAX_TOGETHER], self._waiting[MAX_TOGETHER:]
        try:
            with self._transaction() as connection:
                for change in changes:
                    _run(change, connection)
        except Exception as error:  # the transaction failed, and with it all changes
            _fail(changes, error)
        except BaseException:  # only the thread that runs the transaction was interrupted
            _fail(changes, _interruption_error())
            raise
        finally:
            for change in changes:
                change.ended.set()


def _timeout_error() -> StoreUnavailable:
    return StoreUnavailable(
        "The store cannot be used.",
        f"Other changes took more than {TURN_SECONDS:g} seconds.",
        "Nothing was changed. Try again.",
    )


def _fail(changes: Sequence[_Change], error: Exception) -> None:
    for change in changes:
        change.error = change.error or error


def _interruption_error() -> StoreUnavailable:
    return StoreUnavailable(
        "The store cannot be used.",
        "The thread that commits was interrupted.",
        "A change in progress was made completely or not at all. Try again.",
    )


def _run(change: _Change, connection: Connection) -> None:
    try:
        with connection.begin_nested():
            change.value = change.work(connection)
    except DBAPIError as error:
        if not isinstance(error, IntegrityError):  # an error of the database, which may have ended the transaction
            raise
        change.error = error
    except Exception as error:  # whatever `work` raises goes to the thread whose change it is
        change.error = error

"""A database and its transactions, whose errors become those of the store."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Protocol, TypeVar

from sqlalchemy import Connection, Engine
from sqlalchemy.engine import URL
from sqlalchemy.exc import DatabaseError, InterfaceError, InternalError, OperationalError, TimeoutError

from deltamem_tool.errors import first_line
from deltamem_tool.serve.store.errors import StoreDamaged, StoreUnavailable
from deltamem_tool.serve.store.group_commit import GroupCommit
from deltamem_tool.serve.store.overflow import OverflowPages

LOCK_SECONDS = 5.0  # how long a transaction waits for a lock
T = TypeVar("T")


class Dialect(Protocol):
    """The parts that differ between databases.

    one_writer: whether the database runs writing transactions sequentially, so that a process gains by grouping its own
        into one.
    """

    one_writer: bool

    def engine(self) -> Engine:
        """Return a pool of connections. Transactions that write have the execution option `writes`."""

    def lock_set_up(self, connection: Connection) -> None:
        """Keep other programs from creating the tables until the transaction ends."""

    def overflow_pages(self) -> OverflowPages | None:
        """Return the wrapper for contents, or None if contents are not wrapped. The tables must exist."""

    def erase(self, engine: Engine) -> bool | None:
        """Remove deleted content from the database's files. Return whether it is removed; None if unknown."""


class Database:
    """Connections to a database.

    Args:
        url: URL of the database. Errors show it without its password.
        dialect: the parts that differ between databases.
    """

    def __init__(self, url: URL, dialect: Dialect) -> None:
        self._name = url.render_as_string(hide_password=True)
        self._dialect = dialect
        with self._translate_errors():
            self._engine = dialect.engine()
        self._writer = self._engine.execution_options(writes=True)
        self._group = GroupCommit(self.write) if dialect.one_writer else None

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """Open a transaction that sees a consistent state of the database.

        Raises:
            StoreUnavailable: the database cannot be reached, or is locked.
            StoreDamaged: its file is damaged.
        """
        with self._translate_errors(), self._engine.begin() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """Open a transaction that is committed at the end of the block, completely or not at all.

        Raises:
            StoreUnavailable: the database cannot be reached, is locked, or its disk is full.
            StoreDamaged: its file is damaged.
        """
        with self._translate_errors(), self._writer.begin() as connection:
            yield connection

    def change(self, work: Callable[[Connection], T]) -> T:
        """Run `work` in a transaction, and return its result after the commit.

        Raises:
            StoreUnavailable: as in `write`.
            StoreDamaged: the database's file is damaged.
            Exception: raised by `work`; none of its changes is made.
        """
        if self._group is not None:
            return self._group.run(work)
        with self.write() as connection:
            return work(connection)

    @contextmanager
    def set_up(self) -> Iterator[Connection]:
        """As `write`, but only one program at a time can be in such a transaction."""
        with self.write() as connection:
            self._dialect.lock_set_up(connection)
            yield connection

    def overflow_pages(self) -> OverflowPages | None:
        """Return the wrapper for contents, or None if contents are not wrapped."""
        return self._dialect.overflow_pages()

    def erase(self) -> bool | None:
        """Remove deleted content from the database's files. Return whether it is removed; None if unknown."""
        with self._group.paused() if self._group is not None else nullcontext(), self._translate_errors():
            return self._dialect.erase(self._engine)

    def close(self) -> None:
        """Close the connections."""
        self._engine.dispose()

    @contextmanager
    def _translate_errors(self) -> Iterator[None]:
        try:
            yield
        except _UNAVAILABLE as error:
            raise StoreUnavailable(
                f"The store {self._name} cannot be used.",
                f"{_reason(error)}.",
                "A change in progress was made completely or not at all. Try again once the database is available.",
            ) from error
        except (DatabaseError, sqlite3.DatabaseError) as error:
            if type(error) not in _DAMAGED:
                raise
            raise StoreDamaged(
                f"The store {self._name} is damaged.", f"{_reason(error)}.", "Restore it from a backup."
            ) from error


# Outside of SQLAlchemy's statements, the driver raises its own errors.
_UNAVAILABLE = (OperationalError, InterfaceError, InternalError, TimeoutError, sqlite3.OperationalError)
_DAMAGED = (DatabaseError, sqlite3.DatabaseError)  # not their subclasses: a mistake in a statement, a row that exists


def _reason(error: Exception) -> str:
    """The message of the database."""
    return first_line(getattr(error, "orig", None) or error)

"""SQLite: a single file with one writer at a time, from which deleted content is erased."""

from __future__ import annotations

import os
import sqlite3
import time
from contextlib import closing
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import URL

from deltamem_tool.errors import ConfigError, InstallationError
from deltamem_tool.io.atomic import file_lock, resolve
from deltamem_tool.serve.store.database import LOCK_SECONDS
from deltamem_tool.serve.store.errors import StoreDamaged
from deltamem_tool.serve.store.overflow import OverflowPages
from deltamem_tool.serve.store.schema import about

OLDEST_SQLITE = (3, 35)  # RETURNING
CONNECTIONS = 16
# With `full`, each commit waits for the disk and survives a loss of power. With `normal`, it survives only a crash of
# the process.
SYNCHRONOUS = ("full", "normal")
ERASE_PAUSE = 0.01  # seconds between two tries to empty the log


class Sqlite:
    """See `Dialect`."""

    one_writer = True

    def __init__(self, url: URL) -> None:
        if not url.database or url.database == ":memory:":
            raise ConfigError(
                "The store's URL does not name a file.", "An SQLite store is a file.", "Use sqlite:///FOLDER/FILE."
            )
        self._synchronous = url.query.get("synchronous", "full")
        if url.query.keys() - {"synchronous"} or self._synchronous not in SYNCHRONOUS:
            raise ConfigError(
                "The store's URL has an unknown option.",
                f"The only option for SQLite is synchronous, which is {' or '.join(SYNCHRONOUS)}.",
                "Correct the part after the question mark.",
            )
        if sqlite3.sqlite_version_info < OLDEST_SQLITE:
            raise InstallationError(
                f"SQLite {sqlite3.sqlite_version} is installed.",
                f"A store needs {'.'.join(map(str, OLDEST_SQLITE))} or later.",
                "Use a newer Python, or PostgreSQL.",
            )
        self._path = resolve(url.database)

    def engine(self) -> Engine:
        """Return a pool of connections to the file, which is created for its owner alone."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with file_lock(self._path):
            if not self._path.exists():  # else closing the file would release the locks that SQLite holds on it here
                os.close(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
            with closing(sqlite3.connect(self._path, LOCK_SECONDS)) as connection:
                _check_owner(connection)
                # Readers do not wait for the writer. The mode is stored in the file; only one program may change it.
                connection.execute("PRAGMA journal_mode = WAL")
                (self._page_size,) = connection.execute("PRAGMA page_size").fetchone()
        engine = create_engine(
            URL.create("sqlite", database=str(self._path)),
            connect_args={"timeout": LOCK_SECONDS},
            hide_parameters=True,
            pool_size=CONNECTIONS,
            max_overflow=0,
            pool_timeout=LOCK_SECONDS,
        )
        event.listen(engine, "connect", self._on_connect)
        event.listen(engine, "begin", _on_begin)
        return engine

    def lock_set_up(self, connection: Connection) -> None:
        """Do nothing: an SQLite file has only one writer at a time."""

    def overflow_pages(self) -> OverflowPages:
        """Return the wrapper for contents, for the page size of the file."""
        return OverflowPages(self._page_size)

    def erase(self, engine: Engine) -> bool:
        """Write the log into the file, where deleted bytes are zeros, and truncate the log.

        Waits for readers in other transactions, up to the time limit for a lock.
        """
        until = time.monotonic() + LOCK_SECONDS
        with engine.connect() as connection:
            driver: Any = connection.connection.dbapi_connection  # outside of a transaction
            while driver.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]:
                if time.monotonic() > until:
                    return False
                time.sleep(ERASE_PAUSE)
        return True

    def _on_connect(self, connection: Any, _: object) -> None:
        connection.isolation_level = None  # `_on_begin` begins transactions
        for pragma in (
            f"synchronous = {self._synchronous}",
            "secure_delete = ON",  # deleted bytes are overwritten with zeros
            "temp_store = MEMORY",
        ):
            connection.execute(f"PRAGMA {pragma}")


def _check_owner(connection: sqlite3.Connection) -> None:
    """Check that the file is empty or a store.

    Raises:
        StoreDamaged: the file is another program's database.
    """
    tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    if tables and about.name not in tables:
        raise StoreDamaged(
            "The file is another program's database.", f"It has the table {tables[0]!r}.", "Use another file."
        )


def _on_begin(connection: Connection) -> None:
    # A transaction that begins as a reader cannot wait for a writer later: its snapshot would be outdated.
    writes = connection.get_execution_options().get("writes")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

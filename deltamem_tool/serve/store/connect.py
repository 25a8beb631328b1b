"""The database of a URL: SQLite or PostgreSQL."""

from __future__ import annotations

from collections.abc import Callable

from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from deltamem_tool.errors import ConfigError
from deltamem_tool.serve.store.database import Database, Dialect
from deltamem_tool.serve.store.postgres import Postgres
from deltamem_tool.serve.store.sqlite import Sqlite


def open_database(url: str) -> Database:
    """Connect to the database at `url`.

    Raises:
        ConfigError: the URL names neither SQLite nor PostgreSQL, or has an unknown option.
        StoreUnavailable: the database cannot be reached.
        StoreDamaged: the file is not a database, or it is another program's database.
    """
    try:
        parsed = make_url(url)
    except ArgumentError:
        parsed = None
    dialects: dict[str, Callable[..., Dialect]] = {"sqlite": Sqlite, "postgresql": Postgres, "postgres": Postgres}
    backend = "" if parsed is None else parsed.drivername.partition("+")[0]
    if parsed is None or backend not in dialects:
        raise ConfigError(
            "The store's URL is invalid.",
            "It names neither SQLite nor PostgreSQL.",
            "Use sqlite:///FOLDER/FILE, or postgresql://USER:PASSWORD@HOST/DATABASE.",
        )
    return Database(parsed, dialects[backend](parsed))

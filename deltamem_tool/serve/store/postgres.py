"""PostgreSQL: a store for several servers."""

from __future__ import annotations

from sqlalchemy import Connection, Engine, create_engine, text
from sqlalchemy.engine import URL

from deltamem_tool.io.installation import check_installation
from deltamem_tool.serve.store.database import LOCK_SECONDS
from deltamem_tool.serve.store.schema import contents

CONNECTIONS = 16
SET_UP_LOCK = 0x64656C74616D656D  # "deltamem" in ASCII
# A server that has disappeared is noticed after these seconds, not after hours.
PATIENCE = {
    "connect_timeout": 5,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 25_000,  # milliseconds; no keepalives are sent while data is unacknowledged
}
# Committed changes survive a loss of power, and waiting for a lock has a time limit.
OPTIONS = f"-c synchronous_commit=on -c lock_timeout={int(LOCK_SECONDS * 1000)}"


class Postgres:
    """See `Dialect`."""

    one_writer = False

    def __init__(self, url: URL) -> None:
        check_installation("postgres")
        self._url = url.set(drivername="postgresql+psycopg")

    def engine(self) -> Engine:
        """Return a pool of connections. Each is tested before use, as the server may have been restarted."""
        settings = self._url.query
        return create_engine(
            self._url,
            connect_args={**PATIENCE, **settings, "options": f"{OPTIONS} {settings.get('options', '')}"},
            hide_parameters=True,
            pool_size=CONNECTIONS,
            max_overflow=0,
            pool_timeout=LOCK_SECONDS,
            pool_pre_ping=True,
        )

    def lock_set_up(self, connection: Connection) -> None:
        """Keep other programs from creating the tables until the transaction ends."""
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": SET_UP_LOCK})

    def overflow_pages(self) -> None:
        """Return None: contents are not wrapped."""

    def erase(self, engine: Engine) -> None:
        """Vacuum the contents, and return None: files and log keep deleted bytes until they are overwritten."""
        with engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
            connection.execute(text(f"VACUUM (SKIP_LOCKED) {contents.name}"))

"""A PostgreSQL server for the tests, on a Unix socket in a temporary folder."""

from __future__ import annotations

import getpass
import itertools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

import pytest

ACCOUNTS = ("postgres", "nobody")  # runs the server if the tests run as root, which PostgreSQL rejects
DEBIAN = "/usr/lib/postgresql/*/bin"


class PostgresServer:
    """A running server; the test is skipped if PostgreSQL is not installed."""

    def __init__(self) -> None:
        self._programs = _programs()
        self._account = _account()
        self.folder = Path(tempfile.mkdtemp(prefix="pg-"))  # a socket's path must be short, and not in a folder of root
        self.own(self.folder)
        self._data = self.folder / "data"
        self._names = (f"test{number}" for number in itertools.count())
        self._run("initdb", "--auth=trust", "--username=deltamem", "--encoding=UTF8", "--no-sync", "-D", self._data)
        self.start()

    def start(self) -> None:
        """Start it, and wait until it answers. It need not sync, since tests kill the server but not the machine."""
        options = f"-c listen_addresses= -c unix_socket_directories={self.folder} -c fsync=off"
        self._run("pg_ctl", "start", "-w", "-D", self._data, "-l", self.folder / "log", "-o", options)

    def stop(self) -> None:
        """Stop it, and abort running transactions."""
        self._run("pg_ctl", "stop", "-w", "-m", "fast", "-D", self._data)

    def kill(self) -> None:
        """Kill it; it recovers from its log when it starts again."""
        os.kill(int((self._data / "postmaster.pid").read_text().split()[0]), signal.SIGKILL)
        self._run("pg_ctl", "stop", "-w", "-m", "immediate", "-D", self._data, check=False)

    def remove(self) -> None:
        """Stop it, and delete its files."""
        self._run("pg_ctl", "stop", "-w", "-m", "immediate", "-D", self._data, check=False)
        shutil.rmtree(self.folder)

    def own(self, path: Path) -> None:
        """Let the server write to `path`."""
        shutil.chown(path, self._account)

    def new_schema(self) -> str:
        """Create a schema, and return its URL. It serves as a database of its own, but is created faster."""
        name = next(self._names)
        self.execute(f"CREATE SCHEMA {name}")
        return f"postgresql://deltamem@/postgres?host={self.folder}&options=-csearch_path%3D{name}"

    def execute(self, statement: str) -> None:
        """Run a statement of SQL."""
        self._run("psql", "-X", "-h", self.folder, "-U", "deltamem", "-d", "postgres", "-c", statement)

    def _run(self, program: str, *arguments: object, check: bool = True) -> None:
        result = subprocess.run(
            [self._programs / program, *map(str, arguments)],
            user=self._account,
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # a pipe would stay open in the server
            stderr=subprocess.DEVNULL,
            timeout=60,
        )
        if check and result.returncode:
            log = self.folder / "log"
            pytest.fail(f"{program} failed: {log.read_text() if log.exists() else ''}")


def _programs() -> Path:
    """The folder of PostgreSQL's programs."""
    installed = shutil.which("initdb")
    folders = [Path(installed).resolve().parent] if installed else sorted(Path("/").glob(DEBIAN[1:]))
    if not folders:
        pytest.skip("needs PostgreSQL (apt-get install postgresql)")
    return folders[-1]


def _account() -> str:
    """The account that runs the server."""
    if os.geteuid() != 0:
        return getpass.getuser()
    known = {entry.pw_name for entry in pwd.getpwall()}
    account = next((name for name in ACCOUNTS if name in known), None)
    if account is None:
        pytest.skip("PostgreSQL does not run as root, and there is no account postgres or nobody")
    return account

"""`deltamem serve` as a separate process that can be killed, terminated, and restarted on the same port."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

MODEL = "tiny"
START_SECONDS = 120
END_SECONDS = 90


class ServerProcess:
    """A running server.

    Args:
        model: a folder.
        store: the store's URL.
        log: the file for its output.
        options: further options of the command.
    """

    def __init__(self, model: Path, store: str, log: Path, options: tuple[str, ...] = ()) -> None:
        self._command = [sys.executable, "-m", "deltamem_tool", "serve", str(model), "--model-name", MODEL]
        self._command += ["--store", store, *options]
        self._log = log
        self._port = 0
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def log(self) -> str:
        """All of its output so far."""
        return self._log.read_text()

    def start(self) -> None:
        """Start it, and wait until it listens, on the same port as before if it is restarted."""
        before = len(self.log) if self._log.exists() else 0
        with self._log.open("a") as log:
            self._process = subprocess.Popen(
                [*self._command, "--port", str(self._port)], stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )
        until = time.monotonic() + START_SECONDS
        while (listening := re.search(r"http://127\.0\.0\.1:(\d+)", self.log[before:])) is None:
            assert self._process.poll() is None and time.monotonic() < until, self.log
            time.sleep(0.05)
        self._port = int(listening[1])

    def kill(self) -> None:
        """Kill it, like a failing machine."""
        self._process.kill()
        self._process.wait()

    def terminate(self) -> None:
        """Send it SIGTERM."""
        self._process.send_signal(signal.SIGTERM)

    def wait(self) -> int:
        """Wait until it has ended, and return its exit status."""
        return self._process.wait(END_SECONDS)

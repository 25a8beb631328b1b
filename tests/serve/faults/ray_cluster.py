"""A Ray cluster on this machine that serves the model, in its own process."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import httpx2
import psutil

START_SECONDS = 600  # Ray starts a dozen processes, which takes minutes on a busy machine
END_SECONDS = 120
MAIN = """
import json, sys, time

import ray
from ray import serve

from deltamem_tool.serve.ray_app import application

port, folder, options = json.loads(sys.argv[1])
ray.init(num_cpus=4, include_dashboard=False, _temp_dir=folder)
serve.start(http_options={"host": "127.0.0.1", "port": port})
serve.run(application(options))
print(json.dumps("running"), flush=True)
while True:
    time.sleep(60)
"""


class RayCluster:
    """A running cluster.

    Args:
        log: the file for its output.
        options: of the application.
    """

    def __init__(self, log: Path, **options: object) -> None:
        self._log = log
        self._folder = tempfile.TemporaryDirectory(prefix="ray-")  # a socket's path must be short
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        # Otherwise, Ray prints only one of several similar lines.
        options_of_ray = {"RAY_AUTH_MODE": "disabled", "RAY_DEDUP_LOGS": "0", "RAY_USAGE_STATS_ENABLED": "0"}
        environment = {**os.environ, **options_of_ray}
        with log.open("w") as out:
            arguments = json.dumps([port, self._folder.name, options])
            self._process = psutil.Popen(
                [sys.executable, "-c", MAIN, arguments], stdout=out, stderr=out, env=environment, start_new_session=True
            )
        until = time.monotonic() + START_SECONDS
        while not self._answers():
            assert self._process.poll() is None and time.monotonic() < until, log.read_text()
            time.sleep(1)

    def _answers(self) -> bool:
        """Whether all replicas run. A request that is sent too early could reach one that is not ready."""
        if '"running"\n' not in self._log.read_text():
            return False
        try:
            return httpx2.get(f"{self.url}/ready", timeout=30).status_code == 200
        except httpx2.TransportError:
            return False

    @property
    def answering(self) -> set[int]:
        """The ids of the replicas' processes that have answered a chat completion."""
        lines = [line for line in self._log.read_text().splitlines() if '"path": "/v1/chat/completions"' in line]
        return {int(re.search(r"pid=(\d+)", line)[1]) for line in lines}

    @property
    def replicas(self) -> list[psutil.Process]:
        """The processes of the replicas."""
        processes = self._process.children(recursive=True)
        return [process for process in processes if "ServeReplica:default:Replica" in " ".join(process.cmdline())]

    def end(self) -> None:
        """Stop all of its processes."""
        processes = [self._process, *self._process.children(recursive=True)]
        self._process.send_signal(signal.SIGINT)
        with suppress(psutil.TimeoutExpired):
            self._process.wait(END_SECONDS)
        for process in processes:
            if process.is_running():
                process.kill()
        psutil.wait_procs(processes)
        self._folder.cleanup()

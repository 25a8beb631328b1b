"""Processes of one launch, without a launcher: forked off one that has imported everything."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from multiprocessing.process import BaseProcess

from helpers.forked import forked


def started(count: int, target: Callable, *args) -> list[BaseProcess]:
    """Start `target(*args)` in `count` processes, with the variables that torchrun sets."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [forked(_run, rank, count, port, target, args) for rank in range(count)]
    for process in processes:
        process.start()
    return processes


def together(count: int, target: Callable, *args) -> None:
    """Run `target(*args)` in `count` processes; all of them succeed."""
    processes = started(count, target, *args)
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * count


def _run(rank: int, count: int, port: int, target: Callable, args: tuple) -> None:
    of_all = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in {**of_all, "RANK": rank, "LOCAL_RANK": rank}.items()}
    target(*args)

"""The processes of one launch without a launcher, forked from a process that has imported everything."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess

from helpers.forked_process import forked_process
from torch.distributed import TCPStore


@contextmanager
def started(count: int, target: Callable, *args) -> Iterator[list[BaseProcess]]:
    """Start `target(*args)` in `count` processes, with the variables that torchrun sets."""
    # As under torchrun, they meet in a store of this process. A port chosen for one of them could be taken.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes = [forked_process(_run, rank, count, store.port, target, args) for rank in range(count)]
    for process in processes:
        process.start()
    yield processes


def together(count: int, target: Callable, *args) -> None:
    """Run `target(*args)` in `count` processes, and check that all succeed."""
    with started(count, target, *args) as processes:
        for process in processes:
            process.join()
    assert [process.exitcode for process in processes] == [0] * count


def _run(rank: int, count: int, port: int, target: Callable, args: tuple) -> None:
    of_all = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    of_this = {"RANK": rank, "LOCAL_RANK": rank, "TORCHELASTIC_USE_AGENT_STORE": True}
    os.environ |= {name: str(value) for name, value in (of_all | of_this).items()}
    target(*args)

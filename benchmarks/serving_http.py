"""Measure the overhead of HTTP over the scheduler, the gain from many users, their waiting times, and RAM for memories.

Command: python benchmarks/serving_http.py [--folder DIR] [--users 32] [--tokens 64] [--rounds 6] [--stored 100000]
    [--repeats 5] [--threads N] [--out FILE.md]

The model is the shipped adapter as an ONNX graph for the CPU, or the one in `--folder`. The server is a separate
process, as `deltamem serve` runs it, with a SQLite store, except that all its answers have exactly `--tokens` tokens.
The same requests go to a scheduler in another process. The comparison uses the CPU time of these two processes only.
Clients and other work on the machine are not included, but affect it through caches and clock rates; this matters less
for the time of the server's event loop alone. Time to first token is wall-clock time.
"""

import argparse
import asyncio
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from datetime import date
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import numpy as np
from common import PACKAGES, spread, versions
from serving import all_at_once, exported, request, table
from serving_clients import MODEL, official, plain
from store import fill

from deltamem_tool.bench.timing import cpu_name, interleave
from deltamem_tool.io.cores import default_threads
from deltamem_tool.onnx.runtime.engine import OnnxModel
from deltamem_tool.serve.app import build_app
from deltamem_tool.serve.batching.scheduler import Scheduler
from deltamem_tool.serve.server import bind, run
from deltamem_tool.serve.store import MemoryStore

STATE_BYTES = 4608  # approximate size of a memory file of the shipped model
COSTS = "CPU time of", "a decode step of all", "the event loop's part", "a request without its steps"
GAINS = "requests", "tokens per second", "server, per request", "clients, per request", "clients, of a core"
Clients = Callable[[str, int, int, int, bool], Coroutine[None, None, list[float]]]
Times = dict[str, list[float]]
Seconds = tuple[float, float]  # CPU time of a process, and of its first thread


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--users", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--stored", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        report = measure(options, options.folder or exported(Path(temporary) / "onnx"), Path(temporary))
    print(report)
    if options.out:
        options.out.write_text(report + "\n", encoding="utf-8")


class Process(NamedTuple):
    """A process that runs a server or a scheduler.

    Args:
        pid: its process id.
        url: URL of the server; empty for a scheduler.
        pipe: pipe for the number of tokens in a scheduler's answers.
    """

    pid: int
    url: str
    pipe: Connection

    def of_processor(self) -> float:
        """Return the CPU time of the process in seconds, from Linux' clock of a process (clock_getcpuclockid(3))."""
        return time.clock_gettime((~self.pid << 3) | 2)

    def of_loop(self) -> float:
        """Return the part of its first thread, in which a server handles HTTP (proc_pid_schedstat(5))."""
        return int(Path(f"/proc/{self.pid}/task/{self.pid}/schedstat").read_text().split()[0]) / 1e9


def _serve(pipe: Connection, folder: Path, store: str, options: argparse.Namespace) -> None:
    engine = OnnxModel(folder, threads=options.threads)
    engine.stop_tokens = frozenset()
    listener = bind("127.0.0.1", 0)
    listener.listen()
    app = build_app(MODEL, Scheduler(engine, options.users), MemoryStore(store))
    pipe.send(f"http://127.0.0.1:{listener.getsockname()[1]}")
    run(app, listener)


def _schedule(pipe: Connection, folder: Path, store: str, options: argparse.Namespace) -> None:
    engine = OnnxModel(folder, threads=options.threads)
    engine.stop_tokens = frozenset()
    pipe.send("")
    with Scheduler(engine, options.users, cache_bytes=0) as scheduler:
        while (tokens := pipe.recv()) is not None:
            all_at_once(scheduler, [request(engine, user, tokens) for user in range(options.users)])
            pipe.send(None)


@contextmanager
def process(work: Callable[..., None], folder: Path, store: str, options: argparse.Namespace) -> Iterator[Process]:
    mine, its = multiprocessing.Pipe()
    child = multiprocessing.get_context("spawn").Process(target=work, args=(its, folder, store, options))
    child.start()
    try:
        yield Process(child.pid or 0, mine.recv(), mine)
    finally:
        child.terminate()
        child.join()


def measure(options: argparse.Namespace, folder: Path, temporary: Path) -> str:
    """Return the tables, in Markdown."""
    load = os.getloadavg()[0]
    store = f"sqlite:///{temporary / 'memories.sqlite'}"
    with process(_schedule, folder, store, options) as scheduler, process(_serve, folder, store, options) as server:
        costs, overheads = beside_the_scheduler(scheduler, server, options)
        gains, gain = together(server, options)
        waits = first_tokens(server, options)
    memory = ram(folder, temporary, options)
    return "\n".join(
        [
            f"# A server of {options.users} users at once, {date.today()}",
            "",
            f"{folder.name}: answers of {options.tokens} tokens; {options.repeats} repeats in turn; medians."
            f" {cpu_name()}, {options.threads} thread(s), {os.cpu_count()} cores with a load of {load:.1f} to"
            f" {os.getloadavg()[0]:.1f}; {versions(*PACKAGES, 'uvicorn', 'starlette', 'sqlalchemy')}.",
            "",
            *table(COSTS, costs),
            "",
            "A decode step against the scheduler's: "
            + "; ".join(f"{name} {spread(ratios)}" for name, ratios in overheads.items())
            + " (median, quartiles, range).",
            "",
            *table(GAINS, gains),
            "",
            f"One at a time against all at once, with plain clients: {spread(gain[0])} in wall-clock time,"
            f" {spread(gain[1])} in CPU time of the server.",
            "",
            *table(("answers of", "requests per second", "first token, median", "p95"), waits),
            "",
            *table(("memories in the store", "private memory of the process"), memory),
        ]
    )


def beside_the_scheduler(scheduler: Process, server: Process, options: argparse.Namespace) -> tuple[list, Times]:
    """Measure the CPU time of a decode step, of the event loop in it, and of the rest of a request, in both processes.

    Whole answers take more steps than answers with a quarter of the tokens, and the same amount of everything else.
    """

    def scheduled(tokens: int) -> Seconds:
        before = scheduler.of_processor()
        scheduler.pipe.send(tokens)
        scheduler.pipe.recv()
        return scheduler.of_processor() - before, 0.0

    def served(tokens: int, stream: bool) -> Seconds:
        before = server.of_processor(), server.of_loop()
        asyncio.run(plain(server.url, options.users, 1, tokens, stream))
        return server.of_processor() - before[0], server.of_loop() - before[1]

    def parts(call: Callable[[int], Seconds]) -> tuple[float, float, float]:
        few = options.tokens // 4
        short, long = call(few), call(options.tokens)
        step, of_loop = ((more - less) / (options.tokens - few) for more, less in zip(long, short, strict=True))
        return step, of_loop, (short[0] - few * step) / options.users

    sides: dict[str, Callable[[], tuple[float, float, float]]] = {
        "the scheduler alone": lambda: parts(scheduled),
        "the server, whole answers": lambda: parts(lambda tokens: served(tokens, stream=False)),
        "the server, streamed": lambda: parts(lambda tokens: served(tokens, stream=True)),
    }
    values = interleave(sides, options.repeats).values
    rows = []
    for name, pairs in values.items():
        rows.append((name, *(f"{statistics.median(part) * 1e3:.2f} ms" for part in zip(*pairs, strict=True))))
    alone, *others = values
    ratios = {
        name: [mine[0] / its[0] for mine, its in zip(values[name], values[alone], strict=True)] for name in others
    }
    return rows, ratios


def together(server: Process, options: argparse.Namespace) -> tuple[list[tuple[str, ...]], list[list[float]]]:
    """Measure tokens per second of one user and of all at once, with whole answers, and the gain in both kinds of time.

    The last column is the CPU time that the clients take away from the server.
    """

    requests = options.users * options.rounds

    def ask(clients: Clients, users: int) -> tuple[float, float, float]:
        began = time.perf_counter(), server.of_processor(), time.process_time()
        asyncio.run(clients(server.url, users, requests // users, options.tokens, False))
        ended = time.perf_counter(), server.of_processor(), time.process_time()
        clock, its, mine = ((end - begin) / requests for begin, end in zip(began, ended, strict=True))
        return clock, its, mine

    sides = {
        f"{users_name}, {name}": partial(ask, clients, users)
        for name, clients in (("plain", plain), ("OpenAI's client", official))
        for users_name, users in (("one at a time", 1), (f"{options.users} at once", options.users))
    }
    values = interleave(sides, options.repeats).values
    rows = []
    for name, taken in values.items():
        clock, its, mine = (statistics.median(part) for part in zip(*taken, strict=True))
        times = f"{its * 1e3:.1f} ms", f"{mine * 1e3:.2f} ms", f"{mine / clock:.2f}"
        rows.append((name, f"{options.tokens / clock:,.0f}", *times))
    one, all_users, *_ = values.values()
    pairs = [[a / b for a, b in zip(*pair, strict=True)] for pair in zip(one, all_users, strict=True)]
    return rows, [list(kind) for kind in zip(*pairs, strict=True)][:2]


def first_tokens(server: Process, options: argparse.Namespace) -> list[tuple[str, ...]]:
    """Measure the waiting times of users who ask again as soon as they have an answer."""
    rows = []
    for tokens in (8, options.tokens):
        began = time.perf_counter()
        waits = asyncio.run(plain(server.url, options.users, options.rounds, tokens, stream=True))
        rate = len(waits) / (time.perf_counter() - began)
        quantiles = (f"{value * 1e3:.0f} ms" for value in np.quantile(waits, (0.5, 0.95)))
        rows.append((f"{tokens} tokens", f"{rate:.1f}", *quantiles))
    return rows


def ram(folder: Path, temporary: Path, options: argparse.Namespace) -> list[tuple[str, ...]]:
    """Measure the memory of `deltamem serve` after the same requests, with an empty store and with many memories."""
    rows = []
    for stored in sorted({0, options.stored}):
        url = f"sqlite:///{temporary / f'stored-{stored}.sqlite'}"
        store = MemoryStore(url)
        fill(store, stored, STATE_BYTES)
        store.close()
        command = [sys.executable, "-m", "deltamem_tool", "serve", folder, "--model-name", MODEL, "--port", "0"]
        with subprocess.Popen([*command, "--store", url], stderr=subprocess.PIPE, text=True) as server:
            assert server.stderr is not None
            address = next(filter(None, (re.search(r"http://[\d.:]+", line) for line in server.stderr)))[0]
            threading.Thread(target=server.stderr.read, daemon=True).start()  # a full pipe would block it
            asyncio.run(plain(address, options.users, options.rounds, 8, stream=True))
            rows.append((f"{stored:,}", f"{own_memory(server.pid) / 1e6:.1f} MB"))
            server.terminate()
    return rows


def own_memory(pid: int) -> int:
    """Return the private memory of a process in bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024


if __name__ == "__main__":
    main()

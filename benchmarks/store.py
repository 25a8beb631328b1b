"""Measure how long a SQLite store takes to get and put one of many memories.

Command: python benchmarks/store.py [--memories 1000000] [--bytes 4608] [--calls 2000] [--folder DIR] [--out FILE.md]

4,608 bytes is about the size of a memory file of the shipped adapter. Memories of random bytes are written in large
transactions, with the same rows as `put` writes. Then random ones are read and written again through `MemoryStore`, in
turn with a plain write of the same size and `fdatasync`, the minimum for a commit that waits for the disk. The store
is reopened for each kind of commit. Then several threads put at once, and their changes are committed together.
Deletions come last, because each truncates SQLite's log, which the next change has to start again. CPU time is
measured besides wall-clock time: other work on the machine hardly affects it, and it does not include waits for the
disk. `--folder` keeps the files, and reuses the large one if it exists.
"""

import argparse
import base64
import os
import platform
import random
import resource
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import date
from pathlib import Path

from sqlalchemy import insert

from deltamem_tool.bench.timing import interleave
from deltamem_tool.serve.store import KEY_VARIABLE, MemoryStore
from deltamem_tool.serve.store.contents import Contents
from deltamem_tool.serve.store.schema import memories, tenants, versions

Seconds = tuple[float, float]  # wall-clock time and CPU time
TENANTS = 100
BATCH = 10_000  # memories per transaction
AT_ONCE = 32  # threads that put at once
TURN = {"messages": ["0" * 64] * 4}  # a server's record of a short conversation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memories", type=int, default=1_000_000)
    parser.add_argument("--bytes", type=int, default=4608)
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        report = run(folder, options.memories, options.bytes, options.calls)
    print(report)
    if options.out:
        options.out.write_text(report + "\n", encoding="utf-8")


def run(folder: Path, number: int, size: int, calls: int) -> str:
    """Return the table, in Markdown."""
    path = folder / f"{number}-memories-of-{size}.db"
    filled = None
    if not path.exists():
        begun = time.perf_counter()
        with closing(MemoryStore(f"sqlite:///{path}?synchronous=normal")) as store:
            fill(store, number, size)
        filled = time.perf_counter() - begun
    rows = []
    for title, query in (("waits for the disk (default)", ""), ("`synchronous=normal`", "?synchronous=normal")):
        with closing(MemoryStore(f"sqlite:///{path}{query}")) as store:
            rows.append((title, *measured(store, folder, number, size, calls)))
    os.environ[KEY_VARIABLE] = base64.b64encode(bytes(32)).decode()
    few, encrypted = min(number, BATCH), folder / "encrypted.db"
    encrypted.unlink(missing_ok=True)
    with closing(MemoryStore(f"sqlite:///{encrypted}?synchronous=normal")) as store:
        fill(store, few, size)
        rows.append((f"the same, encrypted, {few:,} memories", *measured(store, folder, few, size, calls)))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    load = os.getloadavg()[0]
    lines = [
        f"# A store of {number:,} memories in SQLite, {date.today()}",
        "",
        f"Memories of {size:,} bytes, {path.stat().st_size / 1e9:.1f} GB on disk"
        + (f", written in {filled:.0f} s" if filled else "")
        + f"; {calls:,} calls of each kind, in turn (deletions: a tenth). Milliseconds of wall-clock time, median and"
        f" 95th percentile, and of CPU time in brackets. {platform.machine()},"
        f" {os.cpu_count()} cores with a load of {load:.1f}; Python {platform.python_version()}, SQLite"
        f" {sqlite3.sqlite_version}. Peak memory of the process: {peak:.0f} MB.",
        "",
        f"| commit | get | put | {AT_ONCE} puts at once, per put | delete | write and `fdatasync` alone |",
        "|---|---|---|---|---|---|",
        *("| " + " | ".join(row) + " |" for row in rows),
    ]
    return "\n".join(lines)


def name_of(index: int) -> tuple[str, str]:
    """Return tenant and id of a memory."""
    return f"tenant-{index % TENANTS}", f"user-{index:07}"


def fill(store: MemoryStore, number: int, size: int) -> None:
    """Write `number` memories to an empty store."""
    form: Contents = store._form
    now = time.time()
    for start in range(0, number, BATCH):
        with store._database.write() as connection:
            indices = range(start, min(start + BATCH, number))
            entries = [
                form.write(connection, os.urandom(size), TURN, "memory", *name_of(index), 1) for index in indices
            ]
            names = [dict(zip(("tenant", "id"), name_of(index), strict=True)) for index in indices]
            first = {"first_version": 1, "version": 1, "created_at": now}
            connection.execute(insert(memories), [name | first for name in names])
            connection.execute(
                insert(versions),
                [
                    name | {"version": 1, "created_at": now, "content": key, "digest": digest, "size": length}
                    for name, (key, digest, length) in zip(names, entries, strict=True)
                ],
            )
        print(f"\r{start + len(indices):,} memories", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    with store._database.write() as connection:
        rows = [{"tenant": f"tenant-{each}", "memories": number // TENANTS} for each in range(TENANTS)]
        stored = number // TENANTS * (size + len(str(TURN)))
        connection.execute(insert(tenants), [row | {"bytes": stored, "deleted_version": 0} for row in rows])


def measured(store: MemoryStore, folder: Path, number: int, size: int, calls: int) -> list[str]:
    """Measure a store, and return the cells of its row."""
    rng = random.Random(0)
    data = os.urandom(size)
    with (folder / "alone").open("wb", buffering=0) as file:

        def get() -> Seconds:
            name = name_of(rng.randrange(number))
            return timed(lambda: store.get(*name))

        def put() -> Seconds:
            name = name_of(rng.randrange(number))
            return timed(lambda: store.put(*name, data, turn=TURN))

        def together() -> Seconds:
            names = [name_of(index) for index in rng.sample(range(number), AT_ONCE)]
            clock, processor = time.perf_counter(), time.process_time()
            for _ in pool.map(lambda name: store.put(*name, data, turn=TURN), names):
                pass
            return (time.perf_counter() - clock) / AT_ONCE, (time.process_time() - processor) / AT_ONCE

        def delete() -> Seconds:
            store.put("tenant-0", "temporary", data, turn=TURN)
            return timed(lambda: store.delete("tenant-0", "temporary"))

        def alone() -> Seconds:
            def write() -> None:
                os.pwrite(file.fileno(), data, 0)
                os.fdatasync(file.fileno())

            return timed(write)

        taken = interleave({"get": get, "put": put, "alone": alone}, calls).values
        with ThreadPoolExecutor(AT_ONCE) as pool:
            taken["together"] = [together() for _ in range(max(2, calls // AT_ONCE))]
        taken["delete"] = [delete() for _ in range(max(2, calls // 10))]
    return [spread(taken[name]) for name in ("get", "put", "together", "delete", "alone")]


def timed(call: Callable[[], object]) -> Seconds:
    """Return wall-clock time and CPU time of a call in seconds."""
    clock, processor = time.perf_counter(), time.thread_time()
    call()
    return time.perf_counter() - clock, time.thread_time() - processor


def spread(seconds: list[Seconds]) -> str:
    """Format medians and 95th percentiles in milliseconds."""
    clock, processor = (
        f"{statistics.median(each) * 1000:.2f}, {statistics.quantiles(each, n=20)[-1] * 1000:.2f}"
        for each in zip(*seconds, strict=True)
    )
    return f"{clock} ({processor})"


if __name__ == "__main__":
    main()

"""Many writers of one memory: each acknowledged change is stored exactly once."""

from __future__ import annotations

import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from threading import Barrier

import pytest
from serve.store import writer

from deltamem_tool.serve.store import Conflict, NotFound, Usage

THREADS = 16
PROCESSES = 4


def together(work, number=THREADS) -> list:
    """The results of `work` for 0, 1, …, all started at the same time."""
    barrier = Barrier(number)

    def begin(index):
        barrier.wait()
        return work(index)

    with ThreadPoolExecutor(number) as threads:
        return list(threads.map(begin, range(number)))


@pytest.mark.slow
def test_threads_lose_no_change(store):
    turns = 5
    answered = together(lambda _: [writer.count_once(store) for _ in range(turns)])
    assert sorted(version for each in answered for version in each) == list(range(1, turns * THREADS + 1))
    assert writer.number_of(store.get(writer.TENANT, writer.NAME).data) == turns * THREADS


@pytest.mark.slow
def test_processes_lose_no_change(store_url, open_store):
    """The processes also create the tables concurrently."""
    turns = 10
    command = [sys.executable, writer.__file__, store_url, str(turns)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(PROCESSES)]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * PROCESSES
    answered = sorted(int(version) for output in outputs for version in output.split())
    assert answered == list(range(1, turns * PROCESSES + 1))
    assert writer.number_of(open_store().get(writer.TENANT, writer.NAME).data) == turns * PROCESSES


def test_only_one_of_many_writers_creates_a_memory(store):
    def create(index):
        try:
            return store.put("acme", "ada", b"%d" % index, None)
        except Conflict:
            return None

    (winner,) = filter(None, together(create))
    assert store.get("acme", "ada") == winner
    assert store.usage("acme").memories == 1


def test_writers_that_accept_any_version_are_serialised(store):
    answered = together(lambda index: store.put("acme", "ada", b"%d" % index).version)
    assert sorted(answered) == list(range(1, THREADS + 1))


@pytest.mark.slow
def test_counted_sizes_match_the_stored_content(store):
    """Writers, readers and deletions access a few memories concurrently."""

    def work(index):
        rng = random.Random(index)
        for step in range(10):
            name = rng.choice("abc")
            data = b"%d %d" % (index, step) * rng.randrange(1, 50)
            calls = [
                (store.put, name, data),
                (store.put, name, data, None),
                (store.delete, name),
                (store.fork, name, "d"),
                (store.restore, name, 1),
                (store.put_response, f"{index} {step}", data, [], ("a", 1)),
            ]
            call, *arguments = rng.choice(calls)
            with suppress(Conflict, NotFound):
                call("acme", *arguments)
            stored = store.get("acme", name)
            assert stored is None or len(stored.data) > 0
        return True

    assert all(together(work))
    names = [memory.id for memory in store.list("acme")]
    sizes = [version.size for name in names for version in store.versions("acme", name)]
    responses = [store.get_response("acme", f"{index} {step}") for index in range(THREADS) for step in range(10)]
    sizes += [len(response.data) + len("[]") for response in responses if response is not None]
    assert store.usage("acme") == Usage(len(names), sum(sizes))

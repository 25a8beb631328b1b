"""Killed servers, unavailable databases and full disks: every acknowledged write is stored completely."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing
from threading import Event, Thread

import pytest
from helpers.full_disk import small_disk, small_files
from serve.store import writer

from deltamem_tool.serve.store import Conflict, MemoryStore, StoreUnavailable

ENDLESS = 1_000_000


@pytest.mark.slow
def test_a_killed_server_loses_no_acknowledged_write(store_url, open_store):
    for _ in range(3):
        command = [sys.executable, writer.__file__, store_url, str(ENDLESS)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            answered = [int(process.stdout.readline()) for _ in range(10)]
            process.send_signal(signal.SIGKILL)
            answered += [int(line) for line in process.stdout.readlines() if line.endswith("\n")]
        stored = open_store().get(writer.TENANT, writer.NAME)
        # One more may be committed without being acknowledged.
        assert writer.number_of(stored.data) == stored.version in (answered[-1], answered[-1] + 1)


@pytest.fixture
def counter_thread(postgres):
    """Counts in a thread, and retries after each error. Yields the store, the acknowledged numbers and the errors."""
    store = MemoryStore(postgres.new_schema())
    answered, errors, stopped = [], [], Event()

    def count():
        while not stopped.is_set():
            try:
                answered.append(writer.count_once(store))
            except StoreUnavailable as error:
                errors.append(error)
                time.sleep(0.05)

    thread = Thread(target=count)
    thread.start()
    yield store, answered, errors
    stopped.set()
    thread.join()
    store.close()


def wait_for_more(answered, number=5):
    end = len(answered) + number
    until = time.monotonic() + 60
    while len(answered) < end:
        assert time.monotonic() < until, "it does not go on"
        time.sleep(0.01)


@pytest.mark.server
@pytest.mark.slow
@pytest.mark.parametrize("end", ["stop", "kill"])
def test_a_restarted_database_is_reconnected(counter_thread, postgres, end):
    store, answered, errors = counter_thread
    wait_for_more(answered)
    getattr(postgres, end)()
    with pytest.raises(StoreUnavailable, match="cannot be used"):
        store.ping()
    while not errors:
        time.sleep(0.01)
    postgres.start()
    wait_for_more(answered)
    store.ping()
    *former, last = answered
    assert [*former, last] == sorted({*former, last})
    stored = store.get(writer.TENANT, writer.NAME)
    assert writer.number_of(stored.data) == stored.version >= last


@pytest.mark.server
def test_a_lost_connection_raises_one_clear_error(postgres):
    """The pool tests a connection before it is used, but this one is lost in the middle of a transaction."""
    with closing(MemoryStore(postgres.new_schema())) as store:
        store.put("acme", "ada", b"1")
        stored = store.get("acme", "ada")

        class Note(dict):  # which is serialised while the transaction runs
            def items(self):
                postgres.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE state LIKE 'idle in%'")
                return super().items()

        with pytest.raises(StoreUnavailable) as raised:
            store.put("acme", "ada", b"2", 1, turn=Note(fed=1))
        assert "terminat" in raised.value.why and "/postgres" in raised.value.what
        assert store.get("acme", "ada") == stored


def test_an_unreachable_database_raises_one_clear_error(tmp_path):
    url = f"postgresql://deltamem:secret@/postgres?host={tmp_path}"
    with pytest.raises(StoreUnavailable) as raised:
        MemoryStore(url)
    assert "secret" not in str(raised.value)


def fill(store: MemoryStore) -> tuple[int, StoreUnavailable]:
    """Write memories until the disk is full. Returns the number of acknowledged ones, and the error."""
    for number in range(ENDLESS):
        try:
            store.put("acme", f"memory {number}", data_of(number))
        except StoreUnavailable as error:
            return number, error
    raise AssertionError("the disk has room for all")


def data_of(number: int) -> bytes:
    """Bytes that PostgreSQL cannot compress."""
    return random.Random(number).randbytes(20_000)


def check_full(store: MemoryStore) -> None:
    """Fill the disk, and check that exactly the acknowledged memories are stored."""
    number, error = fill(store)
    assert number > 0 and re.search("full|space|disk", error.why)
    assert len(store.list("acme", limit=ENDLESS)) == store.usage("acme").memories == number
    for each in range(number):
        assert store.get("acme", f"memory {each}").data == data_of(each)
    with pytest.raises(StoreUnavailable):
        store.put("acme", "memory 0", random.Random(0).randbytes(5_000_000), 1)
    assert store.get("acme", "memory 0").version == 1


def test_a_full_disk_keeps_stored_memories(tmp_path):
    with closing(MemoryStore(f"sqlite:///{tmp_path}/memories.db")) as store:
        with small_files(500_000):
            check_full(store)
        assert store.put("acme", "memory 0", b"new", 1).version == 2


def test_a_full_file_system_keeps_stored_memories(tmp_path):
    with (
        small_disk(tmp_path / "disk", megabytes=2) as disk,
        closing(MemoryStore(f"sqlite:///{disk}/memories.db")) as store,
    ):
        check_full(store)
        store.close()
        with closing(MemoryStore(f"sqlite:///{disk}/memories.db")) as store:
            assert store.get("acme", "memory 0").version == 1


@pytest.mark.server
@pytest.mark.slow
def test_a_full_table_space_keeps_stored_memories(postgres):
    with small_disk(postgres.folder / "disk", megabytes=4) as disk:
        (disk / "space").mkdir()
        postgres.own(disk / "space")
        postgres.execute(f"CREATE TABLESPACE small LOCATION '{disk}/space'")
        url = postgres.new_schema()
        schema = url.rpartition("%3D")[2]
        try:
            with closing(MemoryStore(f"{url}%20-c%20default_tablespace%3Dsmall")) as store:
                check_full(store)
        finally:
            postgres.execute(f"DROP SCHEMA {schema} CASCADE")
            postgres.execute("DROP TABLESPACE small")


def test_a_locked_file_raises_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setattr("deltamem_tool.serve.store.sqlite.LOCK_SECONDS", 0.1)
    with (
        closing(MemoryStore(f"sqlite:///{tmp_path}/memories.db")) as store,
        closing(MemoryStore(f"sqlite:///{tmp_path}/memories.db")) as other,
    ):
        stored = store.put("acme", "ada", b"1")
        with other._database.write():
            with pytest.raises(StoreUnavailable, match="locked"):
                store.put("acme", "ada", b"2", 1)
            assert store.get("acme", "ada") == stored
        store.put("acme", "ada", b"2", 1)
        with pytest.raises(Conflict):
            other.put("acme", "ada", b"2", 1)


def test_a_missing_folder_raises_one_clear_error(tmp_path):
    folder = tmp_path / "store"
    with closing(MemoryStore(f"sqlite:///{folder}/memories.db")) as store:
        store.put("acme", "ada", b"1")
        store._database.close()  # its connections would continue to use the deleted files
        shutil.rmtree(folder)
        with pytest.raises(StoreUnavailable):
            store.put("acme", "ada", b"2", 1)
    assert not os.path.exists(folder)  # noqa: PTH110

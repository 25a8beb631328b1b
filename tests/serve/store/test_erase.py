"""Content deleted from SQLite is erased from its files."""

from __future__ import annotations

import random
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from deltamem_tool.serve.store import MemoryStore, sqlite
from deltamem_tool.serve.store.overflow import OverflowPages

MARKER_BYTES = 16
CONTENT = b"state"
TABLE_LEAF = 13  # the first byte of such a page; an overflow page starts with 0 in files below 2^24 pages


def marked(rng: random.Random, size: int) -> tuple[bytes, bytes]:
    """A marker, and content that repeats it, so that every remnant of twice its length contains the marker."""
    marker = rng.randbytes(MARKER_BYTES)
    return marker, (marker * (size // MARKER_BYTES + 1))[:size]


def left(folder: Path, markers) -> list[bytes]:
    content = b"".join(file.read_bytes() for file in folder.iterdir())
    return [marker for marker in markers if marker in content]


@pytest.fixture
def store(tmp_path):
    store = MemoryStore(f"sqlite:///{tmp_path}/memories.db", keep_versions=3)
    yield store
    store.close()


def test_no_byte_of_a_deleted_memory_is_left(store, tmp_path):
    rng = random.Random(0)
    markers = {}
    for name in ("ada", "eve"):
        markers[name], data = marked(rng, 9216)
        store.put("acme", name, data)
    newer, data = marked(rng, 9216)
    note, _ = marked(rng, 0)
    store.put("acme", "ada", data, turn={"digests": [note.hex()]})
    transcript, _ = marked(rng, 0)
    store.put_response("acme", "resp_1", data, [{"content": transcript.hex()}], ("ada", 2))
    store.restore("acme", "ada", 1)
    store.put("acme", "ada", b"no state")  # the first version is no longer kept

    content = {markers["ada"], newer, note.hex().encode(), transcript.hex().encode()}
    assert len(left(tmp_path, content)) == len(content)
    assert store.delete("acme", "ada").erased
    assert left(tmp_path, content) == []
    assert left(tmp_path, [markers["eve"]])


def test_responses_and_expired_memories_are_erased(store, tmp_path):
    rng = random.Random(0)
    markers = []
    for name, expires_at in (("resp_1", None), ("resp_2", 1)):
        marker, data = marked(rng, 2000)
        markers.append(marker)
        store.put_response("acme", name, data, [], expires_at=expires_at)
    marker, data = marked(rng, 2000)
    markers.append(marker)
    store.put("acme", "ada", data, expires_at=1)
    assert len(left(tmp_path, markers)) == 3
    assert store.expire() == 2
    assert left(tmp_path, markers) == markers[:1]
    assert store.delete_response("acme", "resp_1").erased
    assert left(tmp_path, markers) == []


def test_replaced_versions_are_erased(store, tmp_path):
    rng = random.Random(0)
    marker, data = marked(rng, 9216)
    store.put("acme", "ada", data)
    for _ in range(3):
        store.put("acme", "ada", b"no state")
    assert left(tmp_path, [marker])
    store.expire()
    assert left(tmp_path, [marker]) == []


def test_deletions_of_a_killed_server_are_erased_by_the_next(store, tmp_path, tmp_path_factory):
    rng = random.Random(0)
    marker, data = marked(rng, 9216)
    store.put("acme", "ada", data)
    store._database.erase = lambda: False  # which was killed before
    store.delete("acme", "ada")
    found = tmp_path_factory.mktemp("found")
    for file in tmp_path.iterdir():
        shutil.copy(file, found)
    assert left(found, [marker])
    with closing(MemoryStore(f"sqlite:///{found}/memories.db")) as following:
        assert following.expire() == 0
        assert left(found, [marker]) == []


@pytest.mark.slow
def test_nothing_is_left_after_many_writes_and_deletions(store, tmp_path):
    """Rows move between pages when others are added and removed."""
    rng = random.Random(0)
    stored: dict[str, list[bytes]] = {}
    deleted: set[bytes] = set()
    for step in range(500):
        name = f"memory {rng.randrange(60)}"
        if rng.random() < 0.7:
            marker, data = marked(rng, rng.choice((50, 500, 5000, 20_000)))
            store.put("acme", name, data)
            stored.setdefault(name, []).append(marker)
        elif name in stored:
            assert store.delete("acme", name).erased
            deleted |= set(stored.pop(name))
            if step % 10 == 0:
                assert left(tmp_path, deleted) == []
    assert len(deleted) > 100
    assert left(tmp_path, deleted) == []


@pytest.fixture
def short_lock_timeout(monkeypatch):
    monkeypatch.setattr(sqlite, "LOCK_SECONDS", 0.1)


def test_a_reader_delays_erasure_and_the_receipt_reports_it(short_lock_timeout, store, tmp_path):
    rng = random.Random(0)
    markers = []
    for name in ("ada", "eve"):
        marker, data = marked(rng, 9216)
        markers.append(marker)
        store.put("acme", name, data)
    with closing(sqlite3.connect(tmp_path / "memories.db")) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM deltamem_memories").fetchall()
        assert not store.delete("acme", "ada").erased
        assert store.get("acme", "ada") is None
        assert left(tmp_path, markers) == markers
        reader.execute("ROLLBACK")
    store.expire()
    assert left(tmp_path, markers) == markers[1:]


@pytest.mark.parametrize("page", [512, 1024, 4096, 65536])
def test_overflow_pages_hold_only_content(page):
    pages = OverflowPages(page)
    with closing(sqlite3.connect(":memory:")) as database:
        database.execute(f"PRAGMA page_size = {page}")
        database.execute("CREATE TABLE contents (key INTEGER PRIMARY KEY, content BLOB NOT NULL)")
        for length in range(0, 3 * page, page // 101):
            content = CONTENT * (length // len(CONTENT))
            blob = pages.wrap(content)
            assert pages.unwrap(blob) == content
            database.execute("INSERT INTO contents (content) VALUES (?)", [blob])
        file = database.serialize()
    file_pages = [file[start : start + page] for start in range(0, len(file), page)]
    leaves = [each for each in file_pages if each[0] == TABLE_LEAF and b"contents" not in each]
    assert leaves
    assert not any(CONTENT in leaf for leaf in leaves)
    assert any(CONTENT in each for each in file_pages)

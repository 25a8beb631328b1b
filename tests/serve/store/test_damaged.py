"""Files that are not a store, or are damaged."""

from __future__ import annotations

import random
import shutil
import sqlite3
from contextlib import closing

import pytest
from sqlalchemy import create_engine, text

from deltamem_tool.errors import ConfigError
from deltamem_tool.serve.store import MemoryStore, StoreDamaged, StoreError

MEMORIES = {f"memory {number}": b"%d " % number * 4000 for number in range(30)}


@pytest.fixture(scope="module")
def store_file(tmp_path_factory):
    """The file of a store; read only."""
    path = tmp_path_factory.mktemp("whole") / "memories.db"
    with closing(MemoryStore(f"sqlite:///{path}")) as store:
        for name, data in MEMORIES.items():
            store.put("acme", name, data)
    return path


def read_all(path) -> int:
    """The number of intact memories. Reading any other must raise an error of the store, and no other error."""
    try:
        store = MemoryStore(f"sqlite:///{path}")
    except (StoreError, ConfigError):
        return 0
    right = 0
    with closing(store):
        for name, data in MEMORIES.items():
            try:
                stored = store.get("acme", name)
            except StoreError:
                continue
            if stored is not None:
                assert stored.data == data
                right += 1
    return right


def test_a_truncated_file_raises_and_returns_no_wrong_memory(store_file, tmp_path):
    content = store_file.read_bytes()
    assert read_all(shutil.copy(store_file, tmp_path / "copy.db")) == len(MEMORIES)
    for length in (1, 50, 100, 4096, 4097, len(content) // 2, len(content) - 4096):
        path = tmp_path / f"{length}.db"
        path.write_bytes(content[:length])
        assert read_all(path) < len(MEMORIES)


def test_changed_bytes_raise_and_return_no_wrong_memory(store_file, tmp_path):
    content = store_file.read_bytes()
    rng = random.Random(0)
    for number in range(20):
        changed = bytearray(content)
        for _ in range(30):
            changed[rng.randrange(len(content))] ^= rng.randrange(1, 256)
        path = tmp_path / f"{number}.db"
        path.write_bytes(changed)
        read_all(path)


def test_a_foreign_file_raises_and_is_unchanged(tmp_path):
    letter = tmp_path / "letter.txt"
    letter.write_text("Dear store" * 1000)
    other = tmp_path / "other.db"
    with closing(sqlite3.connect(other)) as database:
        database.execute("CREATE TABLE birds (name TEXT)")
    for path in (letter, other):
        before = path.read_bytes()
        with pytest.raises(StoreDamaged):
            MemoryStore(f"sqlite:///{path}")
        assert path.read_bytes() == before


def test_a_store_file_is_readable_only_by_its_owner(store_file):
    assert store_file.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(("version", "hint"), [(0, "empty database"), (2, "Update")])
def test_tables_of_another_version_raise(store, store_url, open_store, version, hint):
    engine = create_engine(store_url.replace("postgresql:", "postgresql+psycopg:"))
    with engine.begin() as connection:
        connection.execute(text("UPDATE deltamem_store SET schema_version = :version"), {"version": version})
    engine.dispose()
    with pytest.raises(ConfigError, match=hint):
        open_store()

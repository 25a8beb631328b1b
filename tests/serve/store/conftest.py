"""A store in each kind of database."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from deltamem_tool.serve.store import MemoryStore


@pytest.fixture
def store(tmp_path) -> Iterator[MemoryStore]:
    store = MemoryStore(f"sqlite:///{tmp_path}/memories.db")
    yield store
    store.close()

"""A store in each kind of database."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from deltamem_tool.serve.store import MemoryStore


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.server)])
def store_url(request, tmp_path) -> str:
    """The URL of an empty database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/memories.db"
    return request.getfixturevalue("postgres").new_schema()


@pytest.fixture
def open_store(store_url) -> Iterator[Callable[..., MemoryStore]]:
    """Opens the database, each time for another server."""
    stores = []

    def open_store(**options) -> MemoryStore:
        stores.append(MemoryStore(store_url, **options))
        return stores[-1]

    yield open_store
    for store in stores:
        store.close()


@pytest.fixture
def store(open_store) -> MemoryStore:
    return open_store()

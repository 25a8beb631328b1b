"""Memories in a store: read back as written, and never overwritten by a writer that has not seen the newest version."""

from __future__ import annotations

import os

import pytest

from deltamem_tool.errors import ConfigError
from deltamem_tool.serve.store import Conflict, MemoryStore, NotFound, Quota, QuotaExceeded, Usage

NO_NOTE = 4  # bytes of null
DATA = [b"", b"\0" * 9216, bytes(range(256)) * 800]


@pytest.mark.parametrize("data", DATA, ids=len)
def test_a_memory_is_returned_as_stored(store, open_store, data):
    put = store.put("acme", "ada", data, None, {"messages": ["é", "😀"]}, expires_at=None)
    assert (put.version, put.data, put.turn) == (1, data, {"messages": ["é", "😀"]})
    assert put.created_at == put.updated_at
    for server in (store, open_store()):
        assert server.get("acme", "ada") == put


def test_a_writer_with_an_outdated_version_conflicts(store):
    store.put("acme", "ada", b"1", None)
    second = store.put("acme", "ada", b"2", 1)
    for expected in (None, 1, 3):
        with pytest.raises(Conflict):
            store.put("acme", "ada", b"lost", expected)
        if expected is not None:
            with pytest.raises(Conflict):
                store.delete("acme", "ada", expected)
            with pytest.raises(Conflict):
                store.restore("acme", "ada", 1, expected)
    assert store.get("acme", "ada") == second
    assert store.put("acme", "ada", b"3").version == 3  # whatever version is stored


def test_a_missing_memory_gives_none_or_raises(store):
    assert store.get("acme", "ada") is None
    calls = (store.delete, store.versions, lambda *n: store.restore(*n, 1), lambda *n: store.fork(*n, "new"))
    for call in calls:
        with pytest.raises(NotFound):
            call("acme", "ada")
    with pytest.raises(Conflict):
        store.put("acme", "ada", b"1", 1)
    assert store.usage("acme") == Usage(0, 0)


def test_the_newest_versions_are_kept(open_store):
    store = open_store(keep_versions=3)
    for number in range(1, 6):
        store.put("acme", "ada", b"%d" % number)
    assert [each.version for each in store.versions("acme", "ada")] == [5, 4, 3]
    assert store.get("acme", "ada", 3).data == b"3"
    assert store.get("acme", "ada", 2) is None
    assert store.usage("acme") == Usage(1, 3 * (1 + NO_NOTE))


def test_an_earlier_version_becomes_the_next_one(store):
    store.put("acme", "ada", b"first", turn={"fed": 1}, expires_at=9e12)
    store.put("acme", "ada", b"second", turn={"fed": 2}, expires_at=8e12)
    restored = store.restore("acme", "ada", 1)
    assert (restored.version, restored.data, restored.turn) == (3, b"first", {"fed": 1})
    assert restored.expires_at == 8e12
    assert store.get("acme", "ada") == restored
    with pytest.raises(NotFound):
        store.restore("acme", "ada", 7)


def test_a_fork_is_independent(store):
    store.put("acme", "ada", b"1")
    store.put("acme", "ada", b"2", turn={"fed": 2})
    fork = store.fork("acme", "ada", "eve")
    assert (fork.id, fork.version, fork.data, fork.turn) == ("eve", 1, b"2", {"fed": 2})
    assert store.fork("acme", "ada", "old", version=1).data == b"1"
    with pytest.raises(Conflict):
        store.fork("acme", "ada", "eve")
    store.put("acme", "eve", b"3")
    store.delete("acme", "ada")
    assert store.get("acme", "eve").data == b"3"


def test_tenants_do_not_see_each_other(store):
    for tenant in ("acme", "Acme", "acme ", "umbrella"):
        store.put(tenant, "ada", tenant.encode(), None)
    store.delete("umbrella", "ada")
    for tenant in ("acme", "Acme", "acme "):
        assert store.get(tenant, "ada").data == tenant.encode()
        assert [memory.id for memory in store.list(tenant)] == ["ada"]
        assert store.usage(tenant) == Usage(1, len(tenant) + NO_NOTE)
    assert store.list("umbrella") == ()


def test_memories_are_listed_in_pages_in_the_order_of_their_bytes(store):
    names = ["B", "a", "a b", "a-b", "ab", "b", "z", "ä", "中", "😀"]  # in an order that a locale would change
    for name in reversed(names):
        store.put("acme", name, name.encode())
    pages, after = [], None
    while page := store.list("acme", after, limit=3):
        pages.append([memory.id for memory in page])
        after = page[-1].id
    assert pages == [names[:3], names[3:6], names[6:9], names[9:]]
    (newest,) = store.list("acme", "中")
    stored = vars(store.get("acme", "😀"))
    assert vars(newest) == {name: stored[name] for name in vars(newest)}


def test_a_recreated_memory_is_a_different_one(store):
    """A writer that began before the deletion must not restore the deleted memory."""
    for data in (b"1", b"2"):
        store.put("acme", "ada", data)
    version = store.get("acme", "ada").version
    store.delete("acme", "ada")
    with pytest.raises(Conflict):
        store.put("acme", "ada", b"forgotten", version)
    assert store.put("acme", "ada", b"new", None).version == version + 1
    with pytest.raises(Conflict):
        store.put("acme", "ada", b"forgotten", version)
    assert store.put("umbrella", "ada", b"other tenant").version == 1


def test_a_receipt_lists_what_was_deleted(store):
    stored = [store.put("acme", "ada", data) for data in (b"1", b"2")]
    receipt = store.delete("acme", "ada", expected=2)
    assert (receipt.tenant, receipt.id, receipt.responses) == ("acme", "ada", ())
    assert [(each.version, each.digest, each.size, each.created_at) for each in receipt.versions] == [
        (each.version, each.digest, each.size, each.updated_at) for each in reversed(stored)
    ]
    assert receipt.deleted_at >= stored[-1].updated_at
    assert store.get("acme", "ada") is store.get("acme", "ada", 1) is None
    assert store.usage("acme") == Usage(0, 0)


def test_writing_beyond_the_quota_raises(open_store):
    store = open_store(quota=Quota(memories=2, bytes=100), keep_versions=2)
    store.put("acme", "a", b"x" * 40)
    with pytest.raises(QuotaExceeded, match="bytes"):
        store.put("acme", "b", b"x" * 60)
    store.put("acme", "b", b"x")
    with pytest.raises(QuotaExceeded, match="memories"):
        store.put("acme", "c", b"x")
    with pytest.raises(QuotaExceeded, match="memories"):
        store.fork("acme", "b", "c")
    with pytest.raises(QuotaExceeded, match="bytes"):
        store.put_response("acme", "r", b"x" * 60, [])
    store.put("acme", "a", b"x" * 40)
    with pytest.raises(QuotaExceeded, match="bytes"):
        store.put("acme", "a", b"x" * 60)  # the first version is deleted, but this one is longer
    assert store.put("acme", "a", b"x" * 40).version == 3
    assert store.usage("acme") == Usage(2, 2 * (40 + NO_NOTE) + 1 + NO_NOTE)
    assert [memory.id for memory in store.list("acme")] == ["a", "b"]
    store.put("umbrella", "a", b"x" * 90)
    store.delete("acme", "a")
    store.put("acme", "c", b"x" * 60)


@pytest.mark.parametrize("name", ["", "a\0b", "a\nb", "\ud800", "x" * 201])
def test_a_name_that_a_database_cannot_store_raises(store, name):
    for call in (store.get, store.delete, lambda *n: store.put(*n, b"1"), lambda *n: store.get_response(*n)):
        for names in ((name, "ada"), ("acme", name)):
            with pytest.raises(ConfigError, match="name"):
                call(*names)
    assert store.list("acme") == ()


@pytest.mark.parametrize(
    "url",
    [
        "",
        "memories.db",
        "sqlite://",
        "sqlite:///:memory:",
        "mysql://host/name",
        "sqlite:///a.db?mode=memory",
        "sqlite:///a.db?synchronous=off",
    ],
)
def test_a_url_that_is_not_a_store_raises(url, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="URL"):
        MemoryStore(url)
    assert not os.listdir(tmp_path)  # noqa: PTH208

"""Expired memories cannot be read, and are later deleted from the database."""

from __future__ import annotations

import pytest

from deltamem_tool.serve.store import Conflict, NotFound, Usage


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(open_store, clock):
    return open_store(clock=clock)


def test_an_expired_memory_cannot_be_read(store, clock):
    store.put("acme", "ada", b"1", expires_at=1010)
    store.put("acme", "eve", b"1")
    store.put_response("acme", "resp_1", b"1", [], expires_at=1010)
    clock.now = 1009.9
    assert store.get("acme", "ada") is not None
    assert store.get_response("acme", "resp_1") is not None
    clock.now = 1010
    assert store.get("acme", "ada") is store.get("acme", "ada", 1) is store.get_response("acme", "resp_1") is None
    assert [memory.id for memory in store.list("acme")] == ["eve"]
    for call in (store.delete, store.versions, lambda *n: store.restore(*n, 1), lambda *n: store.fork(*n, "new")):
        with pytest.raises(NotFound):
            call("acme", "ada")


def test_the_name_of_an_expired_memory_can_be_reused(store, clock):
    store.put("acme", "ada", b"1", expires_at=1010)
    clock.now = 1010
    with pytest.raises(Conflict):
        store.put("acme", "ada", b"2", 1)
    assert store.put("acme", "ada", b"2", None).version == 2
    assert [each.version for each in store.versions("acme", "ada")] == [2]


def test_each_version_sets_the_expiry_anew(store, clock):
    store.put("acme", "ada", b"1", expires_at=1010)
    store.put("acme", "ada", b"2", expires_at=1020)
    clock.now = 1015
    assert store.get("acme", "ada").data == b"2"
    store.put("acme", "ada", b"3")
    clock.now = 9e9
    assert store.get("acme", "ada").expires_at is None


def test_expired_memories_are_deleted(store, clock):
    for number in range(4):
        store.put("acme", f"memory {number}", b"1", expires_at=1010 if number % 2 else 1020)
        store.put_response("acme", f"response {number}", b"1", [], expires_at=1010 if number % 2 else None)
    store.put_response("acme", "response 4", b"1", [], ("memory 1", 1))
    assert store.expire() == 0
    clock.now = 1010
    assert store.expire() == 4
    assert store.expire() == 0
    clock.now = 0  # before all expiries, so that the store hides nothing
    assert [memory.id for memory in store.list("acme")] == ["memory 0", "memory 2"]
    assert [store.get_response("acme", f"response {n}") is None for n in range(5)] == [False, True, False, True, True]
    stored = [store.get("acme", f"memory {n}") for n in (0, 2)] + [
        store.get_response("acme", f"response {n}") for n in (0, 2)
    ]
    assert store.usage("acme") == Usage(2, sum(len(each.data) for each in stored) + 2 * len("null") + 2 * len("[]"))

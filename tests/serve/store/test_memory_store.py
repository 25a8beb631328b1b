"""Memories in a store: what is put is got, and nobody overwrites what he has not seen."""

from __future__ import annotations

import pytest

from deltamem_tool.serve.store import Conflict, NotFound


def test_a_memory_is_returned_as_it_was_put(store):
    put = store.put("acme", "ada", b"state", None, {"messages": ["abc"]}, expires_at=None)
    assert store.get("acme", "ada") == put
    assert (put.version, put.data, put.turn) == (1, b"state", {"messages": ["abc"]})


def test_a_writer_who_has_not_seen_the_newest_version_is_refused(store):
    store.put("acme", "ada", b"1", None)
    store.put("acme", "ada", b"2", 1)
    for expected in (None, 1, 3):
        with pytest.raises(Conflict):
            store.put("acme", "ada", b"lost", expected)
    assert store.get("acme", "ada").data == b"2"


def test_a_missing_memory_is_none_or_an_error(store):
    assert store.get("acme", "ada") is None
    for call in (store.delete, store.versions, lambda *name: store.fork(*name, "new")):
        with pytest.raises(NotFound):
            call("acme", "ada")
    with pytest.raises(Conflict):
        store.put("acme", "ada", b"1", 1)

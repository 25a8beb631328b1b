"""Snapshots after responses: branches of a conversation, deleted with their memory."""

from __future__ import annotations

import pytest

from deltamem_tool.serve.store import Conflict, NotFound, Usage

TRANSCRIPT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def test_a_response_is_returned_as_stored(store, open_store):
    put = store.put_response("acme", "resp_1", b"state", TRANSCRIPT)
    assert (put.data, put.transcript, put.memory) == (b"state", TRANSCRIPT, None)
    assert open_store().get_response("acme", "resp_1") == put
    assert store.get_response("umbrella", "resp_1") is store.get_response("acme", "resp_2") is None


def test_a_response_is_written_once(store):
    put = store.put_response("acme", "resp_1", b"state", TRANSCRIPT)
    usage = store.usage("acme")
    with pytest.raises(Conflict):
        store.put_response("acme", "resp_1", b"other", [])
    assert store.get_response("acme", "resp_1") == put
    assert store.usage("acme") == usage


def test_a_deleted_response_is_gone(store):
    store.put_response("acme", "resp_1", b"state", TRANSCRIPT)
    with pytest.raises(NotFound):
        store.delete_response("umbrella", "resp_1")
    receipt = store.delete_response("acme", "resp_1")
    assert (receipt.id, receipt.versions, receipt.responses) == (None, (), ("resp_1",))
    assert store.get_response("acme", "resp_1") is None
    assert store.usage("acme") == Usage(0, 0)
    with pytest.raises(NotFound):
        store.delete_response("acme", "resp_1")


def test_responses_are_deleted_with_their_memory(store):
    version = store.put("acme", "ada", b"state").version
    store.put("acme", "eve", b"state")
    for name, memory in (("resp_2", "ada"), ("resp_1", "ada"), ("resp_3", "eve"), ("resp_4", None)):
        store.put_response("acme", name, b"state", TRANSCRIPT, memory and (memory, version))
    assert store.delete("acme", "ada").responses == ("resp_1", "resp_2")
    assert [store.get_response("acme", f"resp_{number}") is not None for number in range(1, 5)] == [
        False,
        False,
        True,
        True,
    ]


def test_a_response_of_a_deleted_memory_is_not_stored(store):
    """Its request began before the deletion, and would otherwise store deleted content again."""
    version = store.put("acme", "ada", b"state").version
    store.delete("acme", "ada")
    with pytest.raises(Conflict):
        store.put_response("acme", "resp_1", b"state", TRANSCRIPT, ("ada", version))
    store.put("acme", "ada", b"new")
    with pytest.raises(Conflict):
        store.put_response("acme", "resp_1", b"state", TRANSCRIPT, ("ada", version))
    assert store.get_response("acme", "resp_1") is None

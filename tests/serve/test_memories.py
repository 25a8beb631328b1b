"""The HTTP routes for memories."""

from __future__ import annotations

import numpy as np
import pytest
from serve.serving import MODEL

from deltamem_tool.chat.conversation import Conversation
from deltamem_tool.chat.engine import empty_memory
from deltamem_tool.memory.file import StoredMemory, memory_bytes, memory_from_bytes

pytestmark = pytest.mark.server

TELL, ASK = "My dog is Rex.", "What is my dog's name?"


def ask(http, text, **options):
    body = {"model": MODEL, "messages": [{"role": "user", "content": text}], **options}
    answer = http.post("/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["message"]["content"]


@pytest.fixture(scope="module")
def rex_memory(shipped_engine):
    """The bytes of a memory that knows the dog."""
    conversation = Conversation(shipped_engine)
    conversation.generate(TELL)
    return memory_bytes(conversation.memory)


def test_a_memory_is_uploaded_used_and_downloaded(http, rex_memory):
    put = http.put("/memories/anna", content=rex_memory)
    assert put.status_code == 201 and put.json()["version"] == 1
    assert "Rex" in ask(http, ASK, user="anna", memory={"write": False})
    response = http.get("/memories/anna")
    assert (
        response.content == rex_memory
        and response.headers["etag"] == put.headers["etag"] == f'"{put.json()["digest"]}"'
    )
    assert http.put("/memories/anna", content=rex_memory).status_code == 200


def test_a_memory_after_a_turn_downloads_as_a_memory_file(http, rex_memory):
    ask(http, TELL, user="bert")
    actual = memory_from_bytes(http.get("/memories/bert").content, "bert")
    expected = memory_from_bytes(rex_memory, "rex")
    for layer, state in expected.states.items():
        np.testing.assert_allclose(actual.states[layer], state, rtol=0, atol=1e-5)


def test_memories_are_listed_in_pages(http, rex_memory):
    for name in ("page-1", "page-2", "page-3"):
        http.put(f"/memories/{name}", content=rex_memory)
    first = http.get("/memories", params={"after": "page-", "limit": 2}).json()
    assert [memory["id"] for memory in first["data"]] == ["page-1", "page-2"] and first["has_more"]
    second = http.get("/memories", params={"after": first["last_id"], "limit": 2}).json()
    assert second["data"][0]["id"] == "page-3"
    assert first["usage"]["memories"] >= 3


def test_versions_are_listed_and_can_be_restored(http):
    ask(http, TELL, user="carl")
    ask(http, "My dog is Bella.", user="carl")
    versions = http.get("/memories/carl/versions").json()["data"]
    assert [version["version"] for version in versions] == [2, 1]
    old = http.get("/memories/carl", params={"version": 1}).content
    assert http.post("/memories/carl/restore", json={"version": 1}).json()["version"] == 3
    assert http.get("/memories/carl").content == old
    assert "Rex" in ask(http, ASK, user="carl")


def test_a_fork_is_independent(http):
    ask(http, TELL, user="dave")
    forked = http.post("/memories/dave/fork", json={"id": "dave-2"})
    assert forked.status_code == 201 and forked.json()["id"] == "dave-2"
    before = http.get("/memories/dave").content
    assert "Rex" in ask(http, ASK, user="dave-2")
    assert http.get("/memories/dave").content == before
    assert http.post("/memories/dave/fork", json={"id": "dave-2"}).status_code == 409


def test_deleting_returns_a_receipt(http, rex_memory):
    http.put("/memories/emil", content=rex_memory)
    receipt = http.delete("/memories/emil").json()
    assert receipt["deleted"] and receipt["id"] == "emil" and receipt["erased"]
    assert [version["version"] for version in receipt["versions"]] == [1]
    assert "tenant" not in receipt and http.get("/memories/emil").status_code == 404
    assert http.delete("/memories/emil").status_code == 404


def test_conditional_requests_follow_the_etag(http, rex_memory):
    tag = http.put("/memories/fred", content=rex_memory).headers["etag"]
    assert http.get("/memories/fred", headers={"If-None-Match": tag}).status_code == 304
    assert http.put("/memories/fred", content=rex_memory, headers={"If-None-Match": "*"}).status_code == 412
    assert http.put("/memories/fred", content=rex_memory, headers={"If-Match": '"other"'}).status_code == 412
    assert http.put("/memories/gone", content=rex_memory, headers={"If-Match": "*"}).status_code == 412
    ask(http, "My cat is Tom.", user="fred")
    for method, path in (("PUT", "/memories/fred"), ("DELETE", "/memories/fred")):
        refused = http.request(method, path, content=rex_memory, headers={"If-Match": tag})
        assert refused.status_code == 412 and refused.json()["error"]["code"] == "precondition_failed"
    refused = http.post("/memories/fred/restore", json={"version": 1}, headers={"If-Match": tag})
    assert refused.status_code == 412
    now = http.get("/memories/fred").headers["etag"]
    assert http.delete("/memories/fred", headers={"If-Match": now}).status_code == 200


@pytest.mark.parametrize("seconds", ["inf", "1e999", "nan", "0", "-1"])
def test_an_expiry_that_is_not_a_positive_number_is_rejected(http, rex_memory, seconds):
    """Infinity could be stored, but not written in the JSON of a list."""
    refused = http.put("/memories/hans", content=rex_memory, params={"expires_in": seconds})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "expires_in"
    assert http.get("/memories/hans").status_code == 404
    assert http.get("/memories").status_code == 200


def test_a_memory_expires(http, rex_memory):
    put = http.put("/memories/gina", content=rex_memory, params={"expires_in": 3600}).json()
    assert put["expires_at"] == pytest.approx(put["updated_at"] + 3600, abs=60)
    ask(http, TELL, user="gina")
    listed = http.get("/memories/gina", headers={"Accept": "application/json"}).json()
    assert listed["version"] == put["version"] + 1 and listed["expires_at"] == put["expires_at"]


def changed(rex, change):
    memory = memory_from_bytes(rex, "rex")
    return change(memory)


def nan(memory):
    from safetensors.numpy import save

    states = {name: tensor.copy() for name, tensor in memory.tensors().items()}
    next(iter(states.values()))[0, 0, 0, 0] = np.nan
    return save(states, {"format": "deltamem-memory", "format_version": "1", "adapter": memory.adapter})


def of_another_adapter(memory):
    return memory_bytes(StoredMemory(memory.states, memory.open_segments, "0" * 64))


def of_two_rows(memory):
    states = {layer: np.concatenate([state, state]) for layer, state in memory.states.items()}
    return memory_bytes(StoredMemory(states, memory.open_segments, memory.adapter))


def of_another_shape(memory):
    states = {layer: state[..., :4, :4].copy() for layer, state in memory.states.items()}
    return memory_bytes(StoredMemory(states, memory.open_segments, memory.adapter))


@pytest.mark.parametrize("change", [nan, of_another_adapter, of_two_rows, of_another_shape])
def test_uploading_a_memory_of_another_model_is_rejected(http, rex_memory, change):
    refused = http.put("/memories/hans", content=changed(rex_memory, change))
    assert refused.status_code == 400 and refused.json()["error"]["code"] == "invalid_memory"
    assert http.get("/memories/hans").status_code == 404


@pytest.mark.parametrize("change", [nan, of_another_adapter, of_two_rows, of_another_shape])
def test_a_stored_memory_of_another_model_is_not_used(http, server, rex_memory, change):
    """This happens after another adapter was served from the same store."""
    name = f"kept-{change.__name__}"
    before = server.store.put("default", name, changed(rex_memory, change))
    body = {"model": MODEL, "messages": [{"role": "user", "content": ASK}], "user": name}
    for options in ({}, {"stream": True}, {"user": "other", "memory": {"from": name}}):
        refused = http.post("/chat/completions", json=body | options)
        assert refused.status_code == 400 and refused.json()["error"]["code"] == "invalid_memory"
    assert server.store.get("default", name) == before and server.store.get("default", "other") is None


@pytest.mark.parametrize("body", [b"", b"{}", b"\xff" * 100, b"\x00" * 8])
def test_uploading_bytes_that_are_not_a_memory_is_rejected(http, body):
    assert http.put("/memories/ida", content=body).status_code == 400
    assert http.get("/memories/ida").status_code == 404


@pytest.mark.parametrize(
    ("method", "path", "options", "status"),
    [
        ("GET", "/memories", {"params": {"limit": "many"}}, 400),
        ("GET", "/memories", {"params": {"limit": "0"}}, 400),
        ("GET", "/memories/x", {"params": {"version": "-1"}}, 400),
        ("GET", "/memories/" + "x" * 201, {}, 400),
        ("GET", "/memories/x%00", {}, 400),
        ("GET", "/memories/x/versions", {}, 404),
        ("POST", "/memories/x/fork", {"json": {"id": "y"}}, 404),
        ("POST", "/memories/x/fork", {"json": {"id": "a/b"}}, 400),
        ("POST", "/memories/x/fork", {"json": {}}, 400),
        ("POST", "/memories/x/restore", {"json": {"version": "1"}}, 400),
        ("POST", "/memories/x/restore", {"json": {"version": 1}}, 404),
        ("POST", "/memories/x", {}, 405),
        ("GET", "/nothing", {}, 404),
    ],
)
def test_invalid_requests_are_rejected(http, method, path, options, status):
    refused = http.request(method, path, **options)
    assert refused.status_code == status, refused.text
    assert refused.json()["error"]["message"]


def test_an_empty_memory_can_be_uploaded(http, shipped_engine):
    assert http.put("/memories/jan", content=memory_bytes(empty_memory(shipped_engine))).status_code == 201


def test_deleting_a_memory_clears_its_prefix_cache(http, server):
    """A long message is sent twice without writing: the second time it is in the cache."""
    long = "hello " * 200

    def cached(**options):
        body = {"model": MODEL, "messages": [{"role": "user", "content": long}], "max_tokens": 1, **options}
        return http.post("/chat/completions", json=body).json()["usage"]["prompt_tokens_details"]["cached_tokens"]

    ask(http, TELL, user="cleo")
    reading = {"user": "cleo", "memory": {"write": False}}
    assert cached(**reading) == 0 and cached(**reading) > 0
    state = http.get("/memories/cleo").content
    before = server.scheduler.counters.cache_bytes
    assert http.delete("/memories/cleo").status_code == 200
    assert http.put("/memories/cleo", content=state).status_code == 201  # the same state
    assert cached(**reading) == 0
    assert server.scheduler.counters.cache_bytes <= before

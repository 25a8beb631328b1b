"""Invalid requests: an error in OpenAI's format, and nothing is written."""

from __future__ import annotations

import json
import socket

import anyio
import httpx2
import pytest
from serve.serving import MODEL
from starlette.responses import PlainTextResponse

from deltamem_tool.serve.body import MAX_BODY_BYTES
from deltamem_tool.serve.header_limit import MAX_HEADER_BYTES, HeaderLimit
from deltamem_tool.serve.openai.parameters import MAX_MESSAGES

pytestmark = pytest.mark.server

USER = {"role": "user", "content": "hello"}
GOOD = {"model": MODEL, "messages": [USER], "user": "anna", "max_tokens": 1}
DEEP = "[" * 100_000


def assert_refused(answer, status, param=None):
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["message"] and set(error) == {"message", "type", "param", "code"}
    assert param is None or error["param"] == param
    assert "Traceback" not in answer.text and ".py" not in answer.text


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"", 400),
        (b"hello", 400),
        (b'{"model": "', 400),
        (b"[]", 400),
        (b'"text"', 400),
        (b"null", 400),
        (b"\xff\xfe", 400),
        (b'{"model": NaN}', 400),
        (b'{"temperature": 1e999}', 400),
        (b'{"seed": ' + b"9" * 10_000 + b"}", 400),
        (DEEP.encode(), 400),
        (b'{"messages": ' + b"[" * 70 + b"]" * 70 + b"}", 400),
        (json.dumps({**GOOD, "messages": [{"role": "user", "content": "\ud800"}]}).encode(), 400),
        (b" " * (MAX_BODY_BYTES + 1), 413),
    ],
)
@pytest.mark.parametrize("path", ["/chat/completions", "/responses", "/memories/x/fork"])
def test_bodies_that_are_not_json_objects_are_rejected(http, path, content, status):
    assert_refused(http.post(path, content=content), status)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"model": None}, "model"),
        ({"model": 1}, "model"),
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [USER] * (MAX_MESSAGES + 1)}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{**USER, "role": "king"}]}, "messages.0.role"),
        ({"messages": [{**USER, "role": "tool"}]}, "messages.0.role"),
        ({"messages": [{**USER, "content": 1}]}, None),
        ({"messages": [{**USER, "content": []}]}, None),
        ({"messages": [{**USER, "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, None),
        ({"messages": [{**USER, "audio": {"id": "1"}}]}, "messages.0.audio"),
        ({"messages": [{**USER, "other": 1}]}, "messages.0.other"),
        ({"messages": [USER, {**USER, "role": "assistant"}]}, "messages"),
        ({"messages": [{**USER, "role": "system"}]}, "messages"),
        ({"messages": [{**USER, "content": "\ue000"}]}, None),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "1"}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 2}, "top_p"),
        ({"seed": 2**64}, "seed"),
        ({"stop": ""}, None),
        ({"stop": ["x"] * 17}, None),
        ({"stream": "yes"}, "stream"),
        ({"user": ""}, "user"),
        ({"user": "x" * 201}, "user"),
        ({"user": "a/b"}, "user"),
        ({"user": "a\nb"}, "user"),
        ({"user": 7}, "user"),
        ({"memory": {"write": "no"}}, "memory.write"),
        ({"memory": {"other": 1}}, "memory.other"),
        ({"memory": {"expires_in": 0}}, "memory.expires_in"),
        ({"n": 2}, "n"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"presence_penalty": 1}, "presence_penalty"),
        ({"logit_bias": {"1": 5}}, "logit_bias"),
        ({"logprobs": True}, "logprobs"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"store": True}, "store"),
        ({"unheard_of": 1}, "unheard_of"),
    ],
)
def test_invalid_and_unsupported_parameters_are_rejected(http, server, change, param):
    before = server.store.list("default")
    assert_refused(http.post("/chat/completions", content=json.dumps(GOOD | change).encode()), 400, param)
    assert server.store.list("default") == before


@pytest.mark.parametrize(
    "change",
    [
        {"n": 1, "frequency_penalty": 0, "presence_penalty": 0.0, "logprobs": False, "tools": [], "stop": None},
        {"response_format": {"type": "text"}, "tool_choice": "none", "store": False, "service_tier": "auto"},
        {"prompt_cache_key": "x", "safety_identifier": "y", "stream_options": None, "memory": None},
        {"messages": [{**USER, "content": [{"type": "text", "text": "hello"}], "name": "anna"}]},
        {"messages": [USER, {"role": "assistant", "content": "Hi", "refusal": None, "tool_calls": None}, USER]},
        {"messages": [{"role": "developer", "content": "be brief"}, USER]},
    ],
)
def test_parameters_without_effect_are_accepted(http, change):
    assert http.post("/chat/completions", json=GOOD | {"user": "otto"} | change).status_code == 200


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"input": ""}, None),
        ({"input": []}, None),
        ({"input": [{"type": "item_reference", "id": "x"}]}, None),
        ({"previous_response_id": "resp_none"}, "previous_response_id"),
        ({"previous_response_id": "\n"}, None),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"metadata": {str(n): "x" for n in range(17)}}, "metadata"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background": True}, "background"),
        ({"text": {"format": {"type": "json_object"}}}, "text"),
        ({"max_output_tokens": -1}, "max_output_tokens"),
    ],
)
def test_invalid_and_unsupported_response_requests_are_rejected(http, change, param):
    assert_refused(http.post("/responses", json={"model": MODEL, "input": "hello"} | change), 400, param)


def test_an_unknown_model_is_rejected(http):
    assert_refused(http.post("/chat/completions", json=GOOD | {"model": "gpt-5"}), 404, "model")


def test_starting_from_a_missing_memory_is_rejected(http):
    options = {"user": "nobody", "memory": {"from": "nothing"}}
    assert_refused(http.post("/chat/completions", json=GOOD | options), 404, "memory.from")
    assert_refused(http.post("/chat/completions", json=GOOD | {"memory": {"from": "resp_x"}}), 400)


def test_a_conversation_longer_than_the_window_is_rejected(http, server):
    long = GOOD | {"user": "long", "messages": [{**USER, "content": "hello " * 3000}]}
    answer = http.post("/chat/completions", json=long)
    assert_refused(answer, 400, "messages")
    assert answer.json()["error"]["code"] == "context_length_exceeded"
    assert server.store.get("default", "long") is None
    assert_refused(http.post("/chat/completions", json=long | {"stream": True}), 400, "messages")


def test_invalid_headers_are_rejected(http):
    for name in ("", "a/b", "x" * 201):
        assert_refused(http.post("/chat/completions", json=GOOD, headers={"X-Deltamem-Memory": name}), 400)
    assert http.get("/models", headers={"X-Long": "x" * (2 * MAX_HEADER_BYTES)}).status_code in (400, 431)


@pytest.mark.parametrize(("length", "status"), [(MAX_HEADER_BYTES, 200), (MAX_HEADER_BYTES + 1, 431)])
def test_headers_that_arrive_at_once_are_bounded(length, status):
    """The connection only bounds headers that are incomplete."""
    sent = []

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "GET", "headers": [(b"x-long", b"x" * (length - len("x-long")))]}
    anyio.run(HeaderLimit(PlainTextResponse("Ok.")), scope, None, send)
    assert sent[0]["status"] == status


@pytest.mark.parametrize(
    "sent",
    [b"\x16\x03\x01 hello\r\n\r\n", b"GET /v1/models HTTP/1.1\r\nX-Long: " + b"x" * 2 * MAX_HEADER_BYTES],
    ids=["not HTTP", "headers that do not end"],
)
def test_a_request_that_is_not_http_or_has_long_headers_is_rejected(sent, server):
    host, _, port = server.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=10) as raw:
        raw.sendall(sent)
        assert raw.recv(100).startswith(b"HTTP/1.1 400")
    assert httpx2.get(f"{server.url}/health").status_code == 200


def test_the_server_still_answers_after_invalid_requests(http):
    assert http.post("/chat/completions", json=GOOD | {"user": "last"}).status_code == 200

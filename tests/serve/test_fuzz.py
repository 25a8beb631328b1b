"""Requests that hypothesis makes up: no 500, no traceback, and nothing written where something is refused."""

from __future__ import annotations

import json
import os
from urllib.parse import quote

import httpx2
import pytest
from helpers.conversations import examples
from hypothesis import given
from hypothesis import strategies as st
from serve.serving import MODEL

pytestmark = [pytest.mark.server, pytest.mark.slow]

EXAMPLES = round(100 * float(os.environ.get("DELTAMEM_LOAD", "1")))
USER = {"role": "user", "content": "hello"}
COMMON = {"model": MODEL, "user": "anna", "memory": {"write": True}, "temperature": 0, "seed": 1, "stream": False}
BODIES = {
    "/chat/completions": {**COMMON, "messages": [USER], "max_tokens": 1, "stop": ["x"]},
    "/responses": {**COMMON, "input": "hello", "max_output_tokens": 1, "store": False, "instructions": "be brief"},
    "/memories/anna/fork": {"id": "ben", "version": 1},
    "/memories/anna/restore": {"version": 1},
}
OTHERS = ("n", "tools", "response_format", "previous_response_id", "metadata", "logit_bias", "top_k", "unknown")
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
VALUES = st.recursive(
    SCALARS, lambda parts: st.lists(parts, max_size=3) | st.dictionaries(st.text(max_size=8), parts, max_size=3)
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(("system", "user", "assistant", "tool")) | SCALARS},
        optional={"content": st.text(max_size=20) | VALUES, "name": VALUES, "tool_calls": VALUES},
    ),
    max_size=4,
)


@st.composite
def requests(draw):
    """A path and a body: a sound one with some of its values changed, or something else altogether."""
    path = draw(st.sampled_from(sorted(BODIES)))
    if draw(st.integers(0, 9)) == 0:
        return path, draw(st.binary(max_size=50) | VALUES.map(lambda value: json.dumps(value).encode()))
    body = dict(BODIES[path])
    for name in draw(st.lists(st.sampled_from((*body, *OTHERS)), max_size=3)):
        value = VALUES if name not in ("messages", "input") else VALUES | MESSAGES
        body[name] = draw(value)
    return path, json.dumps(body).encode()


@pytest.fixture(scope="module")
def http(server):
    with httpx2.Client(timeout=60) as client:
        yield client


def check(server, answer, before):
    assert answer.status_code < 500, answer.text
    if answer.status_code >= 400:
        assert answer.json()["error"]["message"] and "Traceback" not in answer.text
        assert server.store.list("default") == before


@examples(EXAMPLES)
@given(request_=requests())
def test_bodies(server, http, request_):
    path, body = request_
    before = server.store.list("default")
    check(server, http.post(server.api + path, content=body), before)


@examples(EXAMPLES)
@given(
    method=st.sampled_from(("GET", "PUT", "POST", "DELETE", "PATCH", "HEAD", "OPTIONS")),
    name=st.text(max_size=12),
    rest=st.sampled_from(("", "/versions", "/fork", "/restore", "/other")),
    query=st.dictionaries(st.sampled_from(("version", "after", "limit", "expires_in")), st.text(max_size=6)),
    header=st.sampled_from(("If-Match", "If-None-Match", "X-Deltamem-Memory", "Authorization", "Accept")),
    value=st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=12),
)
def test_paths_queries_and_headers(server, http, method, name, rest, query, header, value):
    path = f"{server.api}/memories/{quote(name.encode('utf-8', 'surrogatepass'), safe='')}{rest}"
    before = server.store.list("default")
    answer = http.request(method, path, params=query, headers={header: value.strip()}, content=b"{}")
    assert answer.status_code < 500, answer.text
    if answer.status_code >= 400:
        assert "Traceback" not in answer.text and server.store.list("default") == before

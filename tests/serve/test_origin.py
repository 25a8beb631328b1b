"""Foreign web pages cannot use a server without keys through a browser on its machine."""

from __future__ import annotations

import httpx2
import pytest
from serve.serving import MODEL, serving

CHAT = "/v1/chat/completions"


@pytest.fixture
def server(shipped_engine, tmp_path):
    with serving(shipped_engine, tmp_path, own_pages_only=True) as running:
        yield running


def answer_and_count(server, **headers):
    """The answer to a turn of `anna`, and the number of memories afterwards."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "user": "anna", "max_tokens": 1}
    answer = httpx2.post(server.url + CHAT, json=body, headers=headers)
    return answer, len(server.store.list("default"))


@pytest.mark.server
@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},  # the page of another program on this machine
        {"Host": "evil.example"},
        {"Host": "evil.example:8000", "Origin": "http://evil.example:8000"},  # a name of this machine
        {"Host": "127.0.0.1.evil.example"},
        {"Origin": "http://["},  # no address at all
        {"Host": "["},
    ],
)
def test_requests_of_foreign_origins_are_rejected(server, headers):
    answer, memories = answer_and_count(server, **headers)
    assert (answer.status_code, memories) == (403, 0)
    assert answer.json()["error"]["type"] == "permission_error"


@pytest.mark.server
def test_programs_and_the_servers_own_page_are_answered(server):
    host = server.url.removeprefix("http://")
    for headers in ({}, {"Origin": server.url}, {"Host": host.replace("127.0.0.1", "localhost")}):
        answer, memories = answer_and_count(server, **headers)
        assert (answer.status_code, memories) == (200, 1), answer.text

"""Idle clients are disconnected, so that they occupy no memory and do not delay a shutdown."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import contextmanager

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route

from deltamem_tool.serve import server as serving

pytestmark = pytest.mark.server

SECONDS = 0.5  # of patience in these tests
LARGE = 64 * 2**20  # bytes: more than the system takes for a client


@contextmanager
def connected(monkeypatch, patience):
    """A server of one large answer, and a connection to it."""
    monkeypatch.setattr(serving, patience, SECONDS)
    app = Starlette(routes=[Route("/", lambda request: Response(b"0" * LARGE))])
    listener = serving.bind("127.0.0.1", 0)
    listener.listen()
    server = uvicorn.Server(serving.config_of(app))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        with socket.create_connection(listener.getsockname(), timeout=20) as client:
            yield server, client
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


def until(condition) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_client_that_does_not_read_is_disconnected(monkeypatch):
    with connected(monkeypatch, "DEAF_SECONDS") as (server, client):
        client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        until(lambda: server.server_state.total_requests == 1)
        until(lambda: not server.server_state.connections)


@pytest.mark.parametrize("before", [b"", b"GET /missing HTTP/1.1\r\nHost: localhost\r\n\r\n"], ids=["first", "second"])
def test_a_client_that_sends_incomplete_headers_is_disconnected(monkeypatch, before):
    with connected(monkeypatch, "HEAD_SECONDS") as (server, client):
        client.sendall(before)
        until(lambda: server.server_state.total_requests == bool(before))
        client.sendall(b"GET / HTTP/1.1\r\nHost: ")
        until(lambda: server.server_state.connections)
        until(lambda: not server.server_state.connections)

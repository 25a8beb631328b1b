"""Idle clients are disconnected, so that they occupy no memory and do not delay a shutdown."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from contextlib import contextmanager

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from deltamem_tool.serve import server as serving

pytestmark = pytest.mark.server

SECONDS = 0.5  # of patience with a client in these tests
LARGE = 64 * 2**20  # bytes, more than the system buffers for a client


@contextmanager
def connected(monkeypatch, patience):
    """A server with one large answer, and a connection to it."""
    monkeypatch.setattr(serving, patience, SECONDS)
    with running(lambda request: Response(b"0" * LARGE)) as server_and_client:
        yield server_and_client


@contextmanager
def running(handler):
    """A server of one route, and a connection to it."""
    app = Starlette(routes=[Route("/", handler)])
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


def test_a_long_answer_to_a_pipelined_request_is_sent_whole(monkeypatch):
    """The second request is there before the first answer has ended, so no headers are awaited after it."""
    monkeypatch.setattr(serving, "HEAD_SECONDS", SECONDS)

    async def answer(request: Request) -> Response:
        await asyncio.sleep(float(request.query_params["seconds"]))
        return Response(request.url.query.encode())

    with running(answer) as (_, client):
        for seconds in (SECONDS / 2, 3 * SECONDS):
            client.sendall(f"GET /?seconds={seconds} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        received = b""
        while f"seconds={3 * SECONDS}".encode() not in received:
            piece = client.recv(2**16)
            assert piece, received
            received += piece


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

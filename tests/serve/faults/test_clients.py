"""Clients that disconnect, stop reading, or send incomplete requests."""

from __future__ import annotations

import asyncio
import json
import socket
import time

import httpx2
import pytest
from serve.faults.load import Load, check_users, new_user, times
from serve.faults.server_process import MODEL

from deltamem_tool.serve.store import MemoryStore

pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.timeout(900)]  # including the export, on a busy machine

USERS, TURNS = 16, 4
SMALL_BUFFER = 4096  # bytes that a client receives without reading


def test_a_client_that_disconnects_gets_its_answer_later_and_is_written_once(start, sqlite_url, engine):
    server = start(sqlite_url, "--max-batch", "4")
    users = [new_user(number, times(TURNS)) for number in range(USERS)]
    load = Load([server.url], leaving=0.5)
    asyncio.run(load.run(users))
    assert load.outcomes["left"] > 0
    check_users(engine, sqlite_url, users)


def test_clients_rejected_by_a_full_queue_are_answered_later(start, sqlite_url, engine):
    server = start(sqlite_url, "--max-batch", "2", "--max-queue", "4")
    users = [new_user(number, times(2)) for number in range(3 * USERS)]
    load = Load([server.url])
    asyncio.run(load.run(users))
    assert load.outcomes["429"] > 0
    check_users(engine, sqlite_url, users)


def send_head(server, path="/v1/chat/completions", length=None, body=b"", more=""):
    """A connection with the beginning of a request."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BUFFER)
    connection.connect(("127.0.0.1", int(server.url.rsplit(":", 1)[1])))
    length = len(body) if length is None else length
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n"
    connection.sendall(head.encode() + more.encode() + b"\r\n" + body)
    return connection


def body_of(user, text, **options) -> bytes:
    return json.dumps(
        {"model": MODEL, "user": user, "messages": [{"role": "user", "content": text}], **options}
    ).encode()


def test_an_incomplete_request_writes_nothing_and_blocks_nobody(start, sqlite_url, engine):
    server = start(sqlite_url)
    body = body_of("half", "My dog is Rex.")
    halves = [send_head(server, length=len(body), body=body[: len(body) // 2]) for _ in range(100)]
    for half in halves[:50]:
        half.close()
    port = int(server.url.rsplit(":", 1)[1])
    heads = [socket.create_connection(("127.0.0.1", port)) for _ in range(100)]
    for head in heads:
        head.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: ")
    users = [new_user(number, 1) for number in range(4)]
    asyncio.run(Load([server.url]).run(users))
    for connection in halves + heads:
        connection.close()
    server.terminate()
    server.wait()
    store = MemoryStore(sqlite_url)
    assert {memory.id for memory in store.list("default")} == {user.name for user in users}
    store.close()
    check_users(engine, sqlite_url, users)


def test_a_client_that_stops_reading_blocks_nobody(start, sqlite_url):
    """It does not block its own memory either: the answer is stored, and the next request continues from it."""
    server = start(sqlite_url)
    silent = [
        send_head(server, body=body_of(f"silent-{number}", "My dog is Rex.", stream=True)) for number in range(32)
    ]
    store = MemoryStore(sqlite_url)
    until = time.monotonic() + 60
    while len(store.list("default")) < len(silent):
        assert time.monotonic() < until
        time.sleep(0.05)
    store.close()
    answer = httpx2.post(
        f"{server.url}/v1/chat/completions",
        content=body_of("silent-0", "What is my dog's name?"),
        headers={"Content-Type": "application/json"},
        timeout=60,
    ).json()
    assert answer["deltamem"]["version"] == 2 and "Rex" in answer["choices"][0]["message"]["content"]
    server.terminate()
    server.wait()
    for connection in silent:
        connection.close()

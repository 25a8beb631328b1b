"""A server that is killed or terminated while it answers users."""

from __future__ import annotations

import asyncio
import signal

import httpx2
import pytest
from serve.faults.load import Load, check_users, new_user, times

from deltamem_tool.serve.store import MemoryStore

pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.timeout(900)]  # including the export, on a busy machine

USERS, TURNS = 16, 6


def test_a_killed_server_has_stored_every_answered_turn(start, sqlite_url, engine):
    """The server is killed three times. Users continue where they were, and each message is written once."""
    server = start(sqlite_url)
    users = [new_user(number, times(TURNS)) for number in range(USERS)]
    load = Load([server.url])

    async def talk_and_kill():
        async with asyncio.TaskGroup() as group:
            talk = group.create_task(load.run(users))
            for quarter in (1, 2, 3):
                await load.answers(len(users) * times(TURNS) * quarter // 4)
                server.kill()
                check_answered(users)
                await asyncio.to_thread(server.start)
            await talk

    def check_answered(users):
        store = MemoryStore(sqlite_url)
        for user in users:
            stored = store.get("default", user.name)
            assert (0 if stored is None else stored.version) >= len(user.answered)
        store.close()

    asyncio.run(talk_and_kill())
    assert set(load.outcomes) & {"ReadError", "RemoteProtocolError", "cut"}  # requests in flight when it was killed
    check_users(engine, sqlite_url, users)


def test_a_terminated_server_finishes_requests_in_flight(start, sqlite_url, engine):
    server = start(sqlite_url, "--max-batch", "1")
    users = [new_user(number, 1) for number in range(USERS)]
    load = Load([server.url])

    async def talk_and_end():
        async with asyncio.TaskGroup() as group:
            group.create_task(load.run(users))
            await load.answers(1)  # the others' requests are in the queue
            server.terminate()

    asyncio.run(talk_and_end())
    assert load.outcomes == {"200": USERS}
    assert server.wait() == 128 + signal.SIGTERM  # the status that a shell shows
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(f"{server.url}/health")
    check_users(engine, sqlite_url, users)

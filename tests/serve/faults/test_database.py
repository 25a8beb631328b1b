"""A store that fails while a server answers users, and recovers."""

from __future__ import annotations

import asyncio
import resource
from dataclasses import replace
from pathlib import Path

import httpx2
import pytest
from serve.faults.load import Load, User, check_users, new_user, times

pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.timeout(900)]  # including the export, on a busy machine

USERS, TURNS = 16, 6
DOWN_SECONDS = 1.0


@pytest.mark.parametrize("way", ["stop", "kill"])
def test_users_are_served_across_a_restart_of_postgresql(way, start, postgres, engine):
    url = postgres.new_schema()
    server = start(url)
    users = [new_user(number, times(TURNS)) for number in range(USERS)]
    load = Load([server.url])

    async def talk_and_restart():
        async with asyncio.TaskGroup() as group:
            group.create_task(load.run(users))
            await load.answers(len(users) * times(TURNS) // 3)
            await asyncio.to_thread(getattr(postgres, way))
            await asyncio.sleep(DOWN_SECONDS)
            async with httpx2.AsyncClient() as client:
                assert (await client.get(f"{server.url}/health")).status_code == 200
                assert (await client.get(f"{server.url}/ready", timeout=60)).status_code == 503
            await asyncio.to_thread(postgres.start)

    asyncio.run(talk_and_restart())
    assert load.outcomes["503"] + load.outcomes["store_unavailable"] > 0
    check_users(engine, url, users)


def test_users_are_served_again_after_a_full_disk(start, sqlite_url, engine):
    """For a while, no file of the server may grow."""
    server = start(sqlite_url)
    users = [new_user(number, times(TURNS)) for number in range(USERS)]
    load = Load([server.url])
    log = Path(sqlite_url.removeprefix("sqlite:///") + "-wal")

    async def talk_and_fill():
        async with asyncio.TaskGroup() as group:
            group.create_task(load.run(users))
            await load.answers(len(users) * times(TURNS) // 3)
            _, most = resource.prlimit(server.pid, resource.RLIMIT_FSIZE)
            resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (log.stat().st_size, most))
            while not load.outcomes["503"] + load.outcomes["store_unavailable"]:
                await asyncio.sleep(0.01)
            await asyncio.sleep(DOWN_SECONDS)
            resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (most, most))

    asyncio.run(talk_and_fill())
    check_users(engine, sqlite_url, users)


def test_users_continue_on_the_other_server_when_one_is_killed(start, postgres, engine):
    """Both servers share a database. Each user talks to both, and continues with one if the other is dead."""
    url = postgres.new_schema()
    servers = [start(url), start(url)]
    users = [new_user(number, times(TURNS)) for number in range(USERS)]
    load = Load([server.url for server in servers], leaving=0.1)

    async def talk_and_kill():
        async with asyncio.TaskGroup() as group:
            group.create_task(load.run(users))
            await load.answers(len(users) * times(TURNS) // 3)
            servers[0].kill()

    asyncio.run(talk_and_kill())
    assert load.outcomes["ConnectError"] > 0
    check_users(engine, url, users)


def test_clients_of_one_memory_on_two_servers_lose_no_turn(start, postgres, engine):
    """A client that loses a race gets a conflict and retries: each message is written once, in version order."""
    url = postgres.new_schema()
    servers = [start(url), start(url)]
    clients = [replace(new_user(number, times(TURNS)), name="shared") for number in range(4)]
    for number, turn in enumerate(turn for client in clients for turn in client.turns):
        turn.text += f" This is message {number}."  # an identical message would count as a retry
    load = Load([server.url for server in servers])
    asyncio.run(load.run(clients))
    assert load.outcomes["409"] + load.outcomes["conflict"] > 0
    turns = sorted((turn for client in clients for turn in client.turns), key=lambda turn: turn.version)
    assert [turn.version for turn in turns] == list(range(1, len(turns) + 1))
    assert {turn.written for turn in turns} == {1}
    check_users(engine, url, [User("shared", turns)])

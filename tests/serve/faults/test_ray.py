"""A Ray cluster of two replicas over PostgreSQL: routing of users to replicas, and one replica killed."""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import contextmanager
from dataclasses import replace

import psycopg
import pytest
from serve.faults.load import PATIENCE, Load, User, check_users, new_user, times
from serve.faults.server_process import MODEL
from starlette.requests import Request

from deltamem_tool.errors import ConfigError
from deltamem_tool.serve.store.schema import memories

pytest.importorskip("ray", reason="needs Ray: pip install 'deltamem-tool[ray]'")

pytestmark = [
    pytest.mark.ray,
    pytest.mark.server,
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),  # Ray's own, from its imports
]

USERS, TURNS = 16, 6
LOG_SECONDS = 60  # until Ray has collected a replica's log


@pytest.fixture(scope="module")
def url(postgres):
    return postgres.new_schema()


@pytest.fixture(scope="module")
def cluster(folder, url, tmp_path_factory):
    from serve.faults.ray_cluster import RayCluster

    log = tmp_path_factory.mktemp("ray") / "log"
    cluster = RayCluster(log, model=str(folder), model_name=MODEL, store=url, replicas=2, no_keys=True)
    yield cluster
    cluster.end()


@contextmanager
def nothing_committed(url):
    """Block the storing of turns, and yield a function that counts the waiting ones."""
    with psycopg.connect(url) as holder, psycopg.connect(url, autocommit=True) as watcher:
        holder.execute(f"LOCK TABLE {memories.name} IN EXCLUSIVE MODE")
        yield lambda: watcher.execute("SELECT count(*) FROM pg_locks WHERE NOT granted").fetchone()[0]


def test_requests_for_one_memory_go_to_one_replica(cluster, engine, url):
    """They wait for each other there. Over two servers, some would lose a race and get a conflict."""
    clients = [replace(new_user(number, times(TURNS)), name="shared") for number in range(4)]
    for number, turn in enumerate(turn for client in clients for turn in client.turns):
        turn.text += f" This is message {number}."  # an identical message would count as a retry
    load = Load([cluster.url])
    asyncio.run(load.run(clients))
    assert load.outcomes == {"200": len(clients) * times(TURNS)}
    turns = sorted((turn for client in clients for turn in client.turns), key=lambda turn: turn.version)
    check_users(engine, url, [User("shared", turns)])


def test_users_are_divided_among_the_replicas(cluster):
    asyncio.run(Load([cluster.url]).run([replace(new_user(n, 1), name=f"divided-{n}") for n in range(USERS)]))
    until = time.monotonic() + LOG_SECONDS
    while cluster.answering != {process.pid for process in cluster.replicas}:
        assert time.monotonic() < until, cluster.answering
        time.sleep(0.5)


def test_users_continue_when_one_replica_is_killed(cluster, engine, url):
    """A client whose request was in flight gets an error or half an answer, and retries."""
    users = [new_user(number, times(TURNS)) for number in range(USERS)]
    load = Load([cluster.url], leaving=0.1)
    before = cluster.replicas  # searching for them takes longer than an answer

    async def talk_and_kill():
        async with asyncio.TaskGroup() as group:
            group.create_task(load.run(users))
            await load.answers(len(users) * times(TURNS) // 3)
            with nothing_committed(url) as ready:
                async with asyncio.timeout(PATIENCE):
                    while ready() < len(users):  # all requests are in flight, on both replicas
                        await asyncio.sleep(0.05)
                before[0].kill()

    asyncio.run(talk_and_kill())
    assert set(load.outcomes) & {"503", "cut", "ReadError", "RemoteProtocolError"}, (
        load.outcomes
    )  # requests on that replica
    assert not before[0].is_running() and before[1].is_running()
    check_users(engine, url, users)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"store": "sqlite:///memories.sqlite"}, "Several replicas need"),
        ({"no_keys": "false"}, "would answer anybody"),
        ({"api_keys": "missing.txt"}, "does not exist"),
        ({"replicas": "0"}, "replicas must be"),
        ({"replica": "2"}, "did you mean replicas"),
        ({"max_batch": "many"}, "max_batch is invalid"),
    ],
)
def test_invalid_options_raise(change, says):
    from deltamem_tool.serve.ray_app import application

    options = {"model": "onnx", "store": "postgresql://x/y", "no_keys": "true"}
    assert application(options) is not None
    with pytest.raises(ConfigError, match=says):
        application(options | change)


def session(path="/v1/chat/completions", body=b"{}", **headers):
    from deltamem_tool.serve.ray_app import session_of

    named = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return session_of(Request({"type": "http", "path": path, "headers": named, "query_string": b""}), body)


def test_requests_are_routed_by_the_name_of_the_memory():
    anna = session(body=json.dumps({"user": "anna"}).encode())
    assert anna == session(x_deltamem_memory="anna") == session("/v1/memories/anna/fork")
    assert session(x_deltamem_memory="Zoë") == session("/v1/memories/Zoë")
    assert anna == session(body=b'{"user": "ben"}', x_deltamem_memory="anna")  # the header takes precedence
    assert (
        len({anna, session(body=b'{"user": "ben"}'), session(x_deltamem_memory="anna", authorization="Bearer x")}) == 3
    )
    assert session(body=b'{"prompt_cache_key": "k"}') == session(body=b'{"prompt_cache_key": "k", "user": null}') != ""
    assert "anna" not in anna
    for body in (b"", b"{", b"[]", b'{"user": 7}', b'{"user": null}'):
        assert session(body=body) == ""

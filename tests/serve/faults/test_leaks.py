"""No user reads the memory of another, whatever fails in between."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from itertools import cycle

import httpx2
import pytest
from serve.faults.load import KINDS, LENGTH, SAMPLING, Load, check_user, new_user, times
from serve.faults.server_process import MODEL

from deltamem_tool.chat.conversation import Conversation
from deltamem_tool.serve.keys import new_key
from deltamem_tool.serve.store import MemoryStore

pytestmark = [pytest.mark.server, pytest.mark.slow]

# Users, their memories, and turns per memory, which are few because a memory of a hundred facts recalls none of them.
USERS, MEMORIES, TURNS = 64, times(1), 6
CRASHES = min(9, times(3))
TENANTS = ("acme", "globex", "initech", "umbrella")
KNOWN = 0.5  # the share of questions that must be answered with the fact stated just before


def recalled(user) -> list[bool]:
    """For each question, whether the answer contains the name from the turn before."""
    pairs = zip(user.turns[::2], user.turns[1::2], strict=False)
    return [statement.text.split()[-1].rstrip(".") in question.answer for statement, question in pairs]


@pytest.mark.timeout(900 + 300 * MEMORIES)  # on a busy machine
def test_no_answer_or_memory_contains_data_of_another_user(start, sqlite_url, tmp_path, engine):
    """Each is identical to that of a conversation alone, the memories within rounding.

    Users of four tenants have the same names. They talk at once, go before they are answered, and the server is killed,
    told to end and started again meanwhile. Strangers without a memory ask the same questions. DELTAMEM_LOAD=27 are
    10,368 requests that are answered.
    """
    keys = tmp_path / "keys"
    tenants = [(tenant, new_key(keys, tenant)) for tenant in TENANTS]
    server = start(sqlite_url, "--api-keys", str(keys), "--max-batch", "16")
    groups = []
    for number, (tenant, key) in zip(range(USERS), cycle(tenants), strict=False):
        names = [f"user-{number // len(TENANTS)}-{memory}" for memory in range(MEMORIES)]
        talks = [new_user(number + USERS * memory, TURNS) for memory in range(MEMORIES)]
        groups.append(
            [replace(talk, name=name, tenant=tenant, key=key) for talk, name in zip(talks, names, strict=True)]
        )
    users = [user for group in groups for user in group]
    load = Load([server.url], leaving=0.2)
    strangers: dict[str, set[str]] = {}
    number = len(users) * TURNS

    async def talk():
        async with asyncio.TaskGroup() as group:
            talk = group.create_task(load.run_groups(groups))
            others = group.create_task(ask_without_memory())
            for crash in range(1, CRASHES + 1):
                await load.answers(number * crash // (CRASHES + 1))
                if crash % 2:
                    server.kill()
                else:
                    server.terminate()
                    await asyncio.to_thread(server.wait)
                await asyncio.to_thread(server.start)
            await talk
            others.cancel()

    async def ask_without_memory():
        rng = random.Random(0)
        headers = {"Authorization": f"Bearer {tenants[0][1]}"}
        async with httpx2.AsyncClient(headers=headers, timeout=60) as client:
            while True:
                text = f"What is my {rng.choice(KINDS)}'s name?"
                messages = [{"role": "user", "content": text}]
                body = {"model": MODEL, "messages": messages, "max_completion_tokens": LENGTH}
                try:
                    response = await client.post(f"{server.url}/v1/chat/completions", json=body)
                except httpx2.TransportError:
                    await asyncio.sleep(0.1)
                    continue
                assert response.status_code in (200, 503), response.text
                if response.status_code == 200:
                    answers = strangers.setdefault(text, set())
                    answers.add(response.json()["choices"][0]["message"]["content"])

    asyncio.run(talk())
    assert load.outcomes["left"] > 0
    for text, answers in strangers.items():
        assert answers == {Conversation(engine).generate(text, SAMPLING).text}
    store = MemoryStore(sqlite_url)
    for user in users:
        check_user(engine, store, user)
    for tenant in TENANTS:
        assert len(store.list(tenant, limit=len(users))) == len(users) // len(TENANTS)
    store.close()
    known = [found for user in users for found in recalled(user)]
    assert sum(known) >= KNOWN * len(known)  # there were answers that could leak
    print(len(users) * TURNS, "turns,", dict(load.outcomes), f"{sum(known) / len(known):.2f} recalled")

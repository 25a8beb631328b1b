"""Requests for one memory run sequentially in a server; between servers the first to finish wins."""

from __future__ import annotations

import asyncio

import httpx2
import pytest
from serve.serving import MODEL, serving

from deltamem_tool.serve.batching.job import QueueFull
from deltamem_tool.serve.locks import MemoryLocks
from deltamem_tool.serve.message_history import MessageHistory


def test_requests_are_answered_in_order_of_arrival():
    async def run():
        locks, order = MemoryLocks(10), []

        async def hold(number):
            async with locks.hold("acme", "anna"):
                order.append(number)
                await asyncio.sleep(0)

        await asyncio.gather(*map(hold, range(5)))
        return order, locks._entries

    assert asyncio.run(run()) == ([0, 1, 2, 3, 4], {})


def test_requests_for_other_memories_do_not_wait():
    async def run():
        locks = MemoryLocks(0)
        async with locks.hold("acme", "anna"), locks.hold("acme", "ben"), locks.hold("globex", "anna"):
            with pytest.raises(QueueFull):
                async with locks.hold("acme", "anna"):
                    pass
        return locks._entries

    assert asyncio.run(run()) == {}


def test_a_cancelled_waiter_leaves_no_trace():
    async def run():
        locks = MemoryLocks(10)
        async with locks.hold("acme", "anna"):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01), locks.hold("acme", "anna"):
                    pass
            assert locks.waiting == 0
        return locks._entries

    assert asyncio.run(run()) == {}


@pytest.mark.server
def test_of_two_servers_the_first_to_finish_wins(shipped_engine, tmp_path):
    """A lost race gets status 409 and changes nothing. Every message answered with 200 is in the memory once."""
    texts = [f"My dog is Rex {number}." for number in range(12)]

    async def send(client, url, text):
        body = {"model": MODEL, "messages": [{"role": "user", "content": text}], "user": "anna"}
        answer = await client.post(f"{url}/chat/completions", json=body)
        assert answer.status_code == 200 or answer.json()["error"]["code"] == "conflict", answer.text
        return answer.status_code

    async def run(urls):
        async with httpx2.AsyncClient(timeout=60) as client:
            return await asyncio.gather(*(send(client, urls[n % 2], text) for n, text in enumerate(texts)))

    with serving(shipped_engine, tmp_path) as one, serving(shipped_engine, tmp_path) as two:
        statuses = asyncio.run(run((one.api, two.api)))
        stored = one.store.get("default", "anna")
    answered = [text for text, status in zip(texts, statuses, strict=True) if status == 200]
    assert set(statuses) == {200, 409}
    assert stored.version == len(answered)
    fed = MessageHistory.from_json(stored.turn)
    digests = {fed._digest({"role": "user", "content": text}) for text in answered}
    assert {talk.digests[0] for talk in fed.talks} == digests

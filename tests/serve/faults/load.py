"""Users who send turns in order to servers that fail, and the answers of the same conversation alone."""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import count

import httpx2
import numpy as np
from serve.faults.server_process import MODEL

from deltamem_tool.chat.conversation import Conversation
from deltamem_tool.chat.sampling import Sampling
from deltamem_tool.memory.file import memory_from_bytes
from deltamem_tool.serve.keys import ONLY_TENANT
from deltamem_tool.serve.store import MemoryStore

FACTOR = float(os.environ.get("DELTAMEM_LOAD", "1"))  # of the number of requests
TOLERANCE = 1e-5  # for states in float32, which a batch computes in another order
RETRY = {409, 429, 503}  # the answers after which a client tries again
PAUSE = 0.05  # seconds before it does
LENGTH = 16  # maximum tokens of an answer, enough for long ones, since whole answers are compared
SAMPLING = Sampling(LENGTH)
PATIENCE = 240.0  # seconds in which every user must get an answer
NAMES = ("Rex", "Bella", "Luna", "Rocky", "Milo", "Bruno", "Max", "Coco", "Oscar", "Ruby")
KINDS = ("dog", "cat", "horse", "parrot")


def times(number: int) -> int:
    """`number`, scaled to the load that the environment asks for."""
    return max(1, round(number * FACTOR))


@dataclass
class Turn:
    """One message of a user, and the answer that arrived."""

    text: str
    answer: str | None = None
    version: int | None = None
    written: int | None = None


@dataclass
class User:
    """A user with a memory, who sends a message after the answer to the one before."""

    name: str
    turns: list[Turn]
    rng: random.Random = field(default_factory=random.Random)
    tenant: str = ONLY_TENANT
    key: str = "none"

    @property
    def answered(self) -> list[Turn]:
        return [turn for turn in self.turns if turn.answer is not None]


def new_user(number: int, turns: int) -> User:
    """A user who states the names of animals and asks for them. The number determines the user."""
    rng = random.Random(number)
    texts = list[str]()
    while len(texts) < turns:
        kind = rng.choice(KINDS)
        texts += [f"My {kind} is {rng.choice(NAMES)}.", f"What is my {kind}'s name?"]
    return User(f"user-{number}", [Turn(text) for text in texts[:turns]], rng)


class Load:
    """Clients of servers.

    Args:
        urls: of the servers; a client that gets no answer from one tries another.
        leaving: the share of requests whose client disconnects before the answer is complete, and asks again.
        streaming: the share of requests that are streamed.
    """

    def __init__(self, urls: Sequence[str], leaving: float = 0.0, streaming: float = 0.5) -> None:
        self.urls, self.leaving, self.streaming = list(urls), leaving, streaming
        self.outcomes: Counter[str] = Counter()  # statuses and failures
        self.number = 0  # of answers so far

    async def run(self, users: Sequence[User]) -> None:
        """Send the messages of all users concurrently, and repeat each message until it is answered."""
        await self.run_groups([[user] for user in users])

    async def run_groups(self, groups: Sequence[Sequence[User]]) -> None:
        """Like `run`, but the users of each group send sequentially."""
        # A connection per request: the server could close a kept one just when it is used again.
        limits = httpx2.Limits(max_keepalive_connections=0, max_connections=None)
        async with httpx2.AsyncClient(limits=limits, timeout=PATIENCE) as client, asyncio.TaskGroup() as group:
            for users in groups:
                group.create_task(self._talk_in_turn(client, users))

    async def answers(self, number: int) -> None:
        """Wait until this many answers have arrived."""
        before, until = self.number, time.monotonic() + PATIENCE
        while self.number < number:
            if self.number > before:
                before, until = self.number, time.monotonic() + PATIENCE
            assert time.monotonic() < until, dict(self.outcomes)
            await asyncio.sleep(0.005)

    async def _talk_in_turn(self, client: httpx2.AsyncClient, users: Sequence[User]) -> None:
        for user in users:
            await self._talk(client, user)

    async def _talk(self, client: httpx2.AsyncClient, user: User) -> None:
        for turn in user.turns:
            until = time.monotonic() + PATIENCE
            for attempt in count(user.rng.randrange(len(self.urls))):
                assert time.monotonic() < until, dict(self.outcomes)
                url = self.urls[attempt % len(self.urls)]
                leaves = user.rng.random() < self.leaving
                if await self._ask(client, url, user, turn, leaves):
                    self.number += 1
                    break
                await asyncio.sleep(PAUSE * user.rng.random())

    async def _ask(self, client: httpx2.AsyncClient, url: str, user: User, turn: Turn, leaves: bool) -> bool:
        """Send a turn once, and return whether it was answered."""
        streamed = user.rng.random() < self.streaming
        messages = [{"role": "user", "content": turn.text}]
        body = {"model": MODEL, "user": user.name, "messages": messages, "max_completion_tokens": LENGTH}
        headers = {"Authorization": f"Bearer {user.key}"}
        request = self._streamed if streamed else self._whole
        patience = user.rng.random() * 0.2 if leaves else None
        try:
            async with asyncio.timeout(patience):
                return await request(client, f"{url}/v1/chat/completions", headers, body, turn)
        except TimeoutError:
            self.outcomes["left"] += 1
        except httpx2.TransportError as error:
            self.outcomes[type(error).__name__] += 1
        return False

    async def _whole(self, client: httpx2.AsyncClient, url: str, headers: dict, body: dict, turn: Turn) -> bool:
        response = await client.post(url, headers=headers, json=body)
        if not self._good(response.status_code, response.text):
            return False
        answer = response.json()
        self._arrived(turn, answer["choices"][0]["message"]["content"], answer["deltamem"])
        return True

    async def _streamed(self, client: httpx2.AsyncClient, url: str, headers: dict, body: dict, turn: Turn) -> bool:
        text, report = "", None
        async with client.stream("POST", url, headers=headers, json=body | {"stream": True}) as response:
            if response.status_code != 200:
                return self._good(response.status_code, (await response.aread()).decode())
            async for line in response.aiter_lines():
                data = line.removeprefix("data: ")
                if not data or data == "[DONE]":
                    continue
                chunk = json.loads(data)
                if "error" in chunk:
                    self.outcomes[chunk["error"]["code"]] += 1
                    assert chunk["error"]["code"] in ("conflict", "store_unavailable", "shutting_down"), chunk
                    return False
                text += chunk["choices"][0]["delta"].get("content") or ""
                report = chunk.get("deltamem", report)
        if report is None:
            self.outcomes["cut"] += 1
            return False
        self.outcomes["200"] += 1
        self._arrived(turn, text, report)
        return True

    def _good(self, status: int, content: str) -> bool:
        self.outcomes[str(status)] += 1
        assert status == 200 or status in RETRY, content
        return status == 200

    def _arrived(self, turn: Turn, text: str, report: dict) -> None:
        turn.answer, turn.version, turn.written = text, report["version"], report["messages_written"]


def check_user(engine, store, user: User, unanswered: bool = False) -> None:
    """Check that the answers and the memory of a user equal those of a conversation alone.

    Args:
        engine: the model.
        store: has the memory.
        user: a user whose turns are answered, except the last ones.
        unanswered: whether the store may have one more turn than were answered, since the client left or the server was
            killed between storing and answering.
    """
    stored = store.get(user.tenant, user.name)
    number = 0 if stored is None else stored.version
    answered = len(user.answered)
    assert answered <= number <= answered + unanswered
    memory = None
    for turn in user.turns[:number]:
        alone = Conversation(engine, memory)
        expected = alone.generate(turn.text, SAMPLING)
        memory = alone.memory
        if turn.answer is None:
            continue
        if not turn.written:  # written by an attempt whose answer did not arrive; this one only read
            expected = Conversation(engine, memory, write=False).generate(turn.text, SAMPLING)
        assert turn.answer == expected.text, user
    if stored is not None:
        actual = memory_from_bytes(stored.data, user.name)
        for layer, state in memory.states.items():
            np.testing.assert_allclose(actual.states[layer], state, rtol=0, atol=TOLERANCE)


def check_users(engine, url: str, users: Sequence[User]) -> None:
    """Check that every turn of these users is answered, and each of them as `check_user` does.

    Args:
        engine: the model.
        url: of the store.
        users: the users whose turns were sent.
    """
    with closing(MemoryStore(url)) as store:
        for user in users:
            assert len(user.answered) == len(user.turns)
            check_user(engine, store, user)

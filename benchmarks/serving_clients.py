"""Clients of a server. Each of their users asks, waits for the answer, and asks again.

`plain` writes and reads HTTP itself, with so little CPU time that the server is measured. `official` is OpenAI's own
client, which takes a considerable part of the CPU time that the server could use.
"""

import asyncio
import itertools
import json
import time

from openai import AsyncOpenAI

MODEL = "shipped"
LONGEST_ANSWER = 2**20  # bytes of a line
_NUMBERS = itertools.count()  # makes every request different


async def plain(url: str, users: int, rounds: int, tokens: int, stream: bool) -> list[float]:
    """Let every user ask several times. Return the seconds until the first piece of each answer, or a whole answer.

    Raises:
        SystemExit: a response is not an answer.
    """
    waits = list[float]()
    async with asyncio.TaskGroup() as group:
        for user in range(users):
            group.create_task(_plain(url, user, rounds, tokens, stream, waits))
    return waits


async def official(url: str, users: int, rounds: int, tokens: int, stream: bool) -> list[float]:
    """Do the same as `plain` with OpenAI's client."""
    waits = list[float]()
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client, asyncio.TaskGroup() as group:
        for user in range(users):
            group.create_task(_official(client, user, rounds, tokens, stream, waits))
    return waits


def _body(user: int, tokens: int, stream: bool) -> dict:
    text = f"My dog is called Rex and I am user {user}. What is my dog's name? This is question {next(_NUMBERS)}."
    messages = [{"role": "user", "content": text}]
    return {"model": MODEL, "messages": messages, "user": f"user-{user}", "max_tokens": tokens, "stream": stream}


async def _plain(url: str, user: int, rounds: int, tokens: int, stream: bool, waits: list[float]) -> None:
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=LONGEST_ANSWER)
    for _ in range(rounds):
        body = json.dumps(_body(user, tokens, stream)).encode()
        began, first = time.perf_counter(), None
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        if " 200 " not in head:
            raise SystemExit(head)
        if stream:
            while (line := await reader.readline()) != b"0\r\n":  # of the last chunk
                if first is None and _has_text(line):
                    first = time.perf_counter() - began
            await reader.readline()
        else:
            length = next(line.split(":")[1] for line in head.splitlines() if line.lower().startswith("content-length"))
            await reader.readexactly(int(length))
        waits.append(time.perf_counter() - began if first is None else first)
    writer.close()


def _has_text(line: bytes) -> bool:
    """Return whether a line of a stream has a piece of the answer."""
    data = line.removeprefix(b"data: ")
    return data.startswith(b"{") and bool(json.loads(data)["choices"][0]["delta"].get("content"))


async def _official(client: AsyncOpenAI, user: int, rounds: int, tokens: int, stream: bool, waits: list[float]) -> None:
    for _ in range(rounds):
        began, first = time.perf_counter(), None
        answer = await client.chat.completions.create(**_body(user, tokens, stream))
        if stream:
            async for chunk in answer:
                if first is None and chunk.choices[0].delta.content:
                    first = time.perf_counter() - began
        waits.append(time.perf_counter() - began if first is None else first)

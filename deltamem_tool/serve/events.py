"""Server-sent events, for clients that may disconnect or stop reading."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeVar

import anyio
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from deltamem_tool.errors import DeltaMemError

SEND_SECONDS = 30.0  # a client that has read nothing for one to two such periods counts as disconnected
T = TypeVar("T")
_JSON = json.JSONEncoder(ensure_ascii=False)


def encode_event(data: Any, name: str | None = None) -> bytes:
    """Encode one event."""
    text = data if isinstance(data, str) else _JSON.encode(data)
    return f"{f'event: {name}' + chr(10) if name else ''}data: {text}\n\n".encode()


def event_encoder(data: Callable[[str], Any]) -> Callable[[str], bytes]:
    """Return a function that encodes the event of `data(text)`. Everything but the text is encoded only once."""
    mark = secrets.token_hex()
    before, after = encode_event(data(mark)).split(_JSON.encode(mark).encode())
    return lambda text: before + _JSON.encode(text).encode() + after


class EventStream(Response):
    """A response that sends events as they come. Events that wait for the network are sent together.

    The generator does not wait for the client, so that it finishes its work however slowly the client reads. When the
    client disconnects, the generator is closed.

    Args:
        events: encoded events. The generator raises no `DeltaMemError`.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all events, or stop when the client disconnects."""
        await cancel_on_disconnect(receive, self._stream(send))

    async def _stream(self, send: Send) -> None:
        waiting, changed, ended = list[bytes](), asyncio.Event(), False
        sends, sending = 0, False

        async def make() -> None:
            nonlocal ended
            async with aclosing(self._events) as events:
                async for chunk in events:
                    waiting.append(chunk)
                    changed.set()
            ended = True
            changed.set()

        async def watch() -> None:
            before = -1
            while not sending or sends > before:
                before = sends
                await anyio.sleep(SEND_SECONDS)
            group.cancel_scope.cancel()  # the client does not read

        async def put(**message: Any) -> None:
            nonlocal sends, sending
            sends, sending = sends + 1, True
            await send(message)
            sending = False

        async with anyio.create_task_group() as group:
            group.start_soon(make)
            group.start_soon(watch)
            await put(type="http.response.start", status=self.status_code, headers=self.raw_headers)
            more = True
            while more:
                await changed.wait()
                changed.clear()
                body, more = b"".join(waiting), not ended
                waiting.clear()
                await put(type="http.response.body", body=body, more_body=more)
            group.cancel_scope.cancel()


async def cancel_on_disconnect(receive: Receive, work: Awaitable[T]) -> T | None:
    """Return the result of `work`. If the client disconnects, cancel `work` and return None.

    Raises:
        DeltaMemError: raised by `work`.
    """
    result: T | None = None
    failure: DeltaMemError | None = None

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        group.cancel_scope.cancel()

    async with anyio.create_task_group() as group:
        group.start_soon(watch)
        try:
            result = await work
        except DeltaMemError as error:  # the task group would wrap it in an ExceptionGroup
            failure = error
        group.cancel_scope.cancel()
    if failure is not None:
        raise failure
    return result

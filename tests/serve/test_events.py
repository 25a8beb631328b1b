"""Streams: complete for readers, finished without readers, and closed when the client disconnects."""

from __future__ import annotations

import json

import anyio
import pytest

from deltamem_tool.errors import ConfigError
from deltamem_tool.serve import events
from deltamem_tool.serve.events import EventStream, cancel_on_disconnect, encode_event, event_encoder

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend():
    return "asyncio"


@pytest.mark.parametrize("text", ["", 'a "b"\n\\', "\u2028é\U0001f436", "\x00\x1f"])
def test_event_encoder_matches_encode_event(text):
    def data(text):
        return {"model": 'm"', "choices": [{"delta": {"content": text}, "finish_reason": None}]}

    encoded = event_encoder(data)(text)
    assert encoded == encode_event(data(text)) and json.loads(encoded.removeprefix(b"data: ")) == data(text)


class Made:
    """A generator of three events that records its progress."""

    def __init__(self):
        self.done, self.closed = False, False

    async def events(self, forever=False):
        try:
            for number in range(3):
                yield encode_event({"number": number})
                await anyio.sleep(0)
            if forever:
                await anyio.sleep_forever()
            self.done = True
        finally:
            self.closed = True


async def nobody_goes():
    await anyio.sleep_forever()


async def test_a_reader_receives_all_events():
    source, sent = Made(), []

    async def send(message):
        sent.append(message)

    await EventStream(source.events())({"type": "http"}, nobody_goes, send)
    assert sent[0]["type"] == "http.response.start"
    body = b"".join(message["body"] for message in sent[1:])
    assert body == b"".join(encode_event({"number": number}) for number in range(3))
    assert [message["more_body"] for message in sent[1:]][-1] is False and source.done


async def test_generation_does_not_wait_for_a_slow_reader(monkeypatch):
    monkeypatch.setattr(events, "SEND_SECONDS", 0.2)
    source, done = Made(), []

    async def send(message):
        if message["type"] == "http.response.body":
            while not source.done:
                await anyio.sleep(0)
            done.append(True)
            await anyio.sleep_forever()

    await EventStream(source.events())({"type": "http"}, nobody_goes, send)
    assert done == [True] and source.closed


async def test_a_slow_reader_receives_all_events(monkeypatch):
    """All pieces together take longer than the timeout, but no single one does."""
    monkeypatch.setattr(events, "SEND_SECONDS", 0.1)
    sent = []

    async def slow():
        for number in range(6):
            yield encode_event({"number": number})
            await anyio.sleep(0.1)

    async def send(message):
        await anyio.sleep(0.02)
        sent.append(message)

    await EventStream(slow())({"type": "http"}, nobody_goes, send)
    assert sent[-1]["more_body"] is False and b"".join(m["body"] for m in sent[1:]).count(b"number") == 6


async def test_a_client_that_waits_for_a_piece_is_not_disconnected(monkeypatch):
    monkeypatch.setattr(events, "SEND_SECONDS", 0.05)
    sent = []

    async def late():
        await anyio.sleep(0.3)
        yield encode_event("late")

    async def send(message):
        sent.append(message)

    await EventStream(late())({"type": "http"}, nobody_goes, send)
    assert sent[-1]["body"] == encode_event("late")


async def test_a_disconnected_client_stops_the_generation():
    source, sent = Made(), []

    async def goes():
        while len(sent) < 2:
            await anyio.sleep(0)
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    await EventStream(source.events(forever=True))({"type": "http"}, goes, send)
    assert source.closed and not source.done


async def test_an_error_is_raised_unchanged():
    async def fails():
        raise ConfigError("no", "", "")

    with pytest.raises(ConfigError, match="no"):
        await cancel_on_disconnect(nobody_goes, fails())


async def test_the_result_is_returned():
    async def work():
        return 7

    assert await cancel_on_disconnect(nobody_goes, work()) == 7

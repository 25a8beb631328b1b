"""What all request handlers share: the model, the store, the API keys, and the answering of turns."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from starlette.requests import HTTPConnection
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from deltamem_tool.serve.batching.scheduler import Scheduler
from deltamem_tool.serve.errors import RequestError
from deltamem_tool.serve.events import cancel_on_disconnect
from deltamem_tool.serve.keys import ONLY_TENANT, ApiKeys
from deltamem_tool.serve.locks import MemoryLocks
from deltamem_tool.serve.metrics import Metrics
from deltamem_tool.serve.store import MemoryStore
from deltamem_tool.serve.turns import Outcome, Request, Turns

CLIENT_CLOSED_REQUEST = 499  # nginx's status for a client that disconnected before the answer; nobody receives it


@dataclass(frozen=True)
class Service:
    """The components of a server.

    Args:
        model: name of the model for clients.
        scheduler: runs the model.
        store: holds the memories.
        keys: accepted API keys; None accepts every request.
        locks: locks of the memories.
        turns: answers requests.
        metrics: counters.
        created: time when the server started.
    """

    model: str
    scheduler: Scheduler
    store: MemoryStore
    keys: ApiKeys | None
    locks: MemoryLocks
    turns: Turns
    metrics: Metrics
    created: int = field(default_factory=lambda: int(time.time()))

    def tenant_of(self, request: HTTPConnection) -> str:
        """Return the tenant of a request.

        Raises:
            RequestError: its key is missing or wrong.
        """
        return ONLY_TENANT if self.keys is None else self.keys.tenant_of(request.headers)

    def check_model(self, name: str) -> None:
        """Check that the server has the model that a request names.

        Raises:
            RequestError: it has another.
        """
        if name != self.model:
            raise RequestError(
                f"The model {name!r} does not exist.",
                f"This server runs {self.model!r}.",
                "Correct the name.",
                status=404,
                code="model_not_found",
                param="model",
            )

    async def complete(self, http: HttpRequest, request: Request) -> Outcome | None:
        """Return the outcome of a request that is not streamed; None if the client has disconnected."""
        return await cancel_on_disconnect(http.receive, _outcome(self.turns.answer(replace(request, streamed=False))))

    async def first_event(self, http: HttpRequest, events: AsyncGenerator[str | Outcome, None]) -> str | Outcome | None:
        """Return the first event of a streamed answer; None if the client has disconnected."""
        first = await cancel_on_disconnect(http.receive, anext(events))
        if first is None:
            await events.aclose()
        return first


async def _outcome(events: AsyncGenerator[str | Outcome, None]) -> Outcome:
    outcome: Outcome | None = None
    async with aclosing(events):
        async for event in events:
            if not isinstance(event, str):
                outcome = event
    assert outcome is not None
    return outcome


def disconnected_response() -> Response:
    """Return the response for a client that has disconnected."""
    return Response(status_code=CLIENT_CLOSED_REQUEST)


def service_of(request: HTTPConnection) -> Service:
    """Return the service of the application that received a request."""
    service: Service = request.app.state.service
    return service

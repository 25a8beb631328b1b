"""The ASGI application: routes, middleware, and startup and shutdown."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from anyio.to_thread import run_sync
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route

from deltamem_tool.errors import DeltaMemError
from deltamem_tool.serve import health, memories, openapi
from deltamem_tool.serve.batching.scheduler import Scheduler
from deltamem_tool.serve.errors import RequestError, error_response
from deltamem_tool.serve.expiry import expire_regularly
from deltamem_tool.serve.header_limit import HeaderLimit
from deltamem_tool.serve.keys import ApiKeys
from deltamem_tool.serve.locks import MemoryLocks
from deltamem_tool.serve.logs import RequestLog
from deltamem_tool.serve.metrics import Metrics
from deltamem_tool.serve.openai import chat, models, responses
from deltamem_tool.serve.origin import SameOriginOnly
from deltamem_tool.serve.service import Service
from deltamem_tool.serve.store import MemoryStore
from deltamem_tool.serve.turns import Turns
from deltamem_tool.serve.web_page import page_routes

REQUEST_SECONDS = 300.0  # time limit of a request
MAX_WAITING = 256  # requests that wait for a memory in use

Handler = Callable[[Request], Awaitable[Response]]


def build_app(
    model: str,
    scheduler: Scheduler,
    store: MemoryStore,
    keys: ApiKeys | None = None,
    window: int | None = None,
    seconds: float = REQUEST_SECONDS,
    max_waiting: int = MAX_WAITING,
    own_pages_only: bool = False,
) -> Starlette:
    """Return the application. When it shuts down, it closes the scheduler and the store.

    Args:
        model: name of the model for clients.
        scheduler: runs the model.
        store: holds the memories.
        keys: accepted API keys; None accepts every request.
        window: maximum number of tokens in a context; None for as many as the model supports.
        seconds: time limit for a request, in seconds.
        max_waiting: maximum number of requests that wait for a memory in use.
        own_pages_only: refuse requests from pages of other origins: see `SameOriginOnly`.
    """
    locks, metrics = MemoryLocks(max_waiting), Metrics(scheduler)
    turns = Turns(scheduler, store, locks, metrics, window, seconds)
    service = Service(model, scheduler, store, keys, locks, turns, metrics)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        expiry = asyncio.create_task(expire_regularly(store))
        try:
            yield
        finally:
            expiry.cancel()
            await run_sync(scheduler.close)
            await run_sync(store.close)

    guard = [Middleware(SameOriginOnly)] if own_pages_only else []
    app = Starlette(
        routes=[*_routes(), *page_routes()],
        middleware=[Middleware(RequestLog, metrics=metrics), Middleware(HeaderLimit), *guard],
        lifespan=lifespan,
        exception_handlers=_HANDLERS,
    )
    app.state.service = service
    return app


def _routes() -> list[Route]:
    def route(method: str, path: str, handler: Handler) -> Route:
        return Route(path, handler, methods=[method])

    return [
        route("POST", "/v1/chat/completions", chat.complete),
        route("POST", "/v1/responses", responses.create),
        route("GET", "/v1/responses/{id}", responses.retrieve),
        route("DELETE", "/v1/responses/{id}", responses.delete),
        route("GET", "/v1/memories", memories.list_memories),
        route("GET", "/v1/memories/{id}", memories.get_memory),
        route("PUT", "/v1/memories/{id}", memories.put_memory),
        route("DELETE", "/v1/memories/{id}", memories.delete_memory),
        route("GET", "/v1/memories/{id}/versions", memories.list_versions),
        route("POST", "/v1/memories/{id}/fork", memories.fork_memory),
        route("POST", "/v1/memories/{id}/restore", memories.restore_memory),
        route("GET", "/v1/models", models.list_models),
        route("GET", "/v1/models/{model:path}", models.get_model),
        route("GET", "/health", health.health),
        route("GET", "/ready", health.ready),
        route("GET", "/metrics", health.metrics),
        route("GET", "/openapi.json", openapi.openapi),
        route("GET", "/docs", openapi.docs),
    ]


async def _domain_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, DeltaMemError)
    return error_response(error)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    if error.status_code == 405:  # Starlette's header lists only the methods of one route with this path
        routes = [route for route in request.app.routes if route.matches(request.scope)[0] is not Match.NONE]
        headers["Allow"] = ", ".join(sorted({method for route in routes for method in route.methods}))
    messages = {404: "This path does not exist.", 405: "This path does not support this method."}
    return error_response(
        RequestError(
            messages.get(error.status_code, f"{error.detail}."),
            f"The request was {request.method} {request.url.path}.",
            "See /docs.",
            status=error.status_code,
            headers=headers,
        )
    )


async def _unexpected_error(request: Request, error: Exception) -> Response:
    """Answer 500 for a bug in the server. The log has the exception."""
    return error_response(RequestError("The server failed.", "", "Nothing of the request was stored.", status=500))


_HANDLERS: Any = {DeltaMemError: _domain_error, HTTPException: _http_error, Exception: _unexpected_error}

"""`deltamem serve` on a Ray cluster: replicas of the model share one store, and each user is served by one of them.

`serve run deltamem_tool.serve.ray_app:application model=… store=…`, with the fields of `RaySettings`.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections.abc import AsyncGenerator, Mapping
from contextlib import AsyncExitStack, suppress
from typing import TYPE_CHECKING, Any, cast

import anyio
from anyio.to_thread import run_sync
from pydantic import Field, ValidationError
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import RayServeException
from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter
from starlette.requests import Request
from starlette.types import Message, Receive, Scope, Send

from deltamem_tool.errors import ConfigError, DeltaMemError, config_error, problems_of
from deltamem_tool.io.safe_json import parse_json
from deltamem_tool.onnx.locate import is_onnx
from deltamem_tool.serve.body import read_bytes
from deltamem_tool.serve.errors import RETRY_SECONDS, RequestError, error_response
from deltamem_tool.serve.events import cancel_on_disconnect
from deltamem_tool.serve.logs import log_as_json
from deltamem_tool.serve.request_memory import named_in_header
from deltamem_tool.serve.server import DRAIN_SECONDS
from deltamem_tool.serve.settings import ServeSettings

if TYPE_CHECKING:
    import torch
    from ray.serve.handle import DeploymentHandle

    from deltamem_tool.chat.engine import Engine

MEMORIES = "/v1/memories/"
# Fields of a body that identify its user. Requests of one conversation without a memory share cached prompts.
BODY_NAMES = ("user", "prompt_cache_key")
# Entries of a request's scope that can be sent to another process.
SENT = ("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path", "headers")


class RaySettings(ServeSettings):
    """The `ServeSettings` of each replica, and the number of replicas."""

    replicas: int = Field(default=2, ge=1)
    ingresses: int = Field(default=1, ge=1, description="Processes that hand requests to the replicas.")
    cpus: float = Field(default=1, ge=0, description="Of each replica.")
    gpus: float = Field(default=0, ge=0, description="Of each replica.")


def application(options: Mapping[str, Any]) -> serve.Application:
    """Return the Ray Serve application.

    Args:
        options: the fields of `RaySettings`.

    Raises:
        ConfigError: an option is invalid, there are several replicas and the store is a file, or there are neither
            keys nor `no_keys`.
    """
    settings = _settings(options)
    if settings.replicas > 1 and not settings.store.startswith("postgres"):
        raise ConfigError(
            "Several replicas need a store that all of them can reach.",
            "SQLite is a file on one machine.",
            "Use store=postgresql://USER:PASSWORD@HOST/DATABASE, or replicas=1.",
        )
    if settings.keys() is None and not settings.no_keys:
        raise ConfigError(
            "The application would answer anybody.",
            "There are no API keys, and Ray decides which address it listens on.",
            "Create a key with deltamem serve --new-key and pass api_keys=FILE, or pass no_keys=true behind a proxy "
            "that authenticates users.",
        )
    # More than a replica queues for the batch and for memories, so that the replica rejects requests itself, with 429.
    requests = 2 * (settings.max_batch + settings.max_queue)
    replica = serve.deployment(
        Replica,
        num_replicas=settings.replicas,
        ray_actor_options={"num_cpus": settings.cpus, "num_gpus": settings.gpus},
        max_ongoing_requests=requests,
        graceful_shutdown_timeout_s=DRAIN_SECONDS,
        request_router_config=RequestRouterConfig(request_router_class=ConsistentHashRouter),
    )
    ingress = serve.deployment(
        serve.ingress(_build_ingress)(),
        name="Ingress",
        num_replicas=settings.ingresses,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=settings.replicas * requests,
        max_queued_requests=settings.max_queue,
        graceful_shutdown_timeout_s=DRAIN_SECONDS,
    )
    return ingress.bind(replica.bind(settings))


def _settings(options: Mapping[str, Any]) -> RaySettings:
    try:
        return RaySettings.model_validate(options)
    except ValidationError as error:
        problems = problems_of(error, {(): list(RaySettings.model_fields)})
        raise config_error("The application's options are invalid.", [why for _, why in problems]) from None


class Replica:
    """A process with the model. All data that must last is in the store.

    Args:
        settings: how it serves.
    """

    async def __init__(self, settings: RaySettings) -> None:  # type: ignore[misc]  # Ray awaits it
        log_as_json()
        engine = await run_sync(_engine, settings)
        self._app = settings.app(engine, settings.keys())
        self._life = AsyncExitStack()
        await self._life.enter_async_context(self._app.router.lifespan_context(self._app))

    async def __del__(self) -> None:
        """Close the scheduler and the store: Ray calls it when the requests have been answered."""
        await self._life.aclose()

    async def answer(self, scope: dict[str, Any], body: bytes) -> AsyncGenerator[Message, None]:
        """Yield the application's messages for a request. If the client disconnects, close the generator."""
        outgoing, incoming = anyio.create_memory_object_stream[Message](math.inf)
        parts = [body]

        async def receive() -> Message:
            if parts:
                return {"type": "http.request", "body": parts.pop(), "more_body": False}
            await asyncio.Event().wait()  # the application is cancelled instead
            raise AssertionError

        async def run() -> None:
            async with outgoing:
                await self._app(scope, receive, outgoing.send)

        work = asyncio.create_task(run())
        try:
            async with incoming:
                async for message in incoming:
                    yield message
            await work
        finally:
            work.cancel()
            with suppress(asyncio.CancelledError):
                await asyncio.wait([work])


class Ingress:
    """An ASGI application that forwards requests to replicas: those for one memory to the same replica while it runs.

    Args:
        replicas: of `Replica`.
    """

    def __init__(self, replicas: DeploymentHandle) -> None:
        self._replicas = replicas.options(method_name="answer", stream=True)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Have a replica answer a request, or say why none does."""
        if scope["type"] == "lifespan":
            await _complete_lifespan(receive, send)
            return
        try:
            body = await read_bytes(Request(scope, receive))
            await cancel_on_disconnect(receive, self._forward(scope, body, send))
        except DeltaMemError as error:
            await error_response(error)(scope, receive, send)

    async def _forward(self, scope: Scope, body: bytes, send: Send) -> None:
        """Send a replica's messages.

        Raises:
            RequestError: it failed before it answered.
        """
        begun = False
        replicas = self._replicas.options(session_id=session_of(Request(scope), body))
        messages = replicas.remote({name: scope[name] for name in SENT if name in scope}, body)
        try:
            async for message in messages:
                begun = True
                await send(message)
        except (RayError, RayServeException) as error:
            if begun:  # the client sees that the answer is incomplete
                raise
            raise RequestError(
                "The replica that should have answered the request failed.",
                "The turn was stored completely or not at all.",
                "Send the request again: a stored turn is not written twice.",
                status=503,
                code="replica_failed",
                headers={"Retry-After": str(RETRY_SECONDS)},
            ) from error
        finally:
            messages.cancel()


def _build_ingress() -> Ingress:
    return Ingress(serve.get_deployment_handle(Replica.__name__, serve.get_replica_context().app_name))


def session_of(request: Request, body: bytes) -> str:
    """Return a key that is the same for all requests that one replica should answer; "" if any replica may answer.

    It is a digest, so that names do not appear in logs, and equal names under two API keys differ.
    """
    name = named_in_header(request.headers)
    if name is None and request.url.path.startswith(MEMORIES):
        name = request.url.path.removeprefix(MEMORIES).partition("/")[0]
    if name is None:
        with suppress(ValueError):  # the replica says what is wrong with it
            fields = parse_json(body)
            names = [fields.get(field) for field in BODY_NAMES] if isinstance(fields, dict) else []
            name = next((name for name in names if isinstance(name, str)), None)
    if name is None:
        return ""
    key = request.headers.get("authorization", "")
    return hashlib.sha256(f"{key}\n{name}".encode(errors="surrogatepass")).hexdigest()


async def _complete_lifespan(receive: Receive, send: Send) -> None:
    """Complete startup and shutdown, for which there is nothing to do."""
    for event in ("startup", "shutdown"):
        await receive()
        await send({"type": f"lifespan.{event}.complete"})


def _engine(settings: RaySettings) -> Engine:
    if is_onnx(settings.model):
        from deltamem_tool.onnx.runtime.engine import OnnxModel

        return OnnxModel(settings.model, "cuda" if settings.gpus else "cpu")
    from deltamem_tool.adapter.load import load
    from deltamem_tool.base_model.tokenizer import tokenizer_of
    from deltamem_tool.chat.torch_engine import TorchModel

    model = load(settings.model)
    if settings.gpus:
        cast("torch.nn.Module", model).cuda()  # transformers hides the signature
    return TorchModel(model, tokenizer_of(model, for_chat=False))

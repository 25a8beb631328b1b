"""The endpoint `/v1/responses`. Each response keeps a snapshot of the memory, from which others can continue."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from typing import Annotated, Any, Literal

from anyio.to_thread import run_sync
from pydantic import Field
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from deltamem_tool.chat.generation import LENGTH
from deltamem_tool.errors import DeltaMemError
from deltamem_tool.serve.body import read_object, validate
from deltamem_tool.serve.errors import RequestError, failure_of
from deltamem_tool.serve.events import EventStream, encode_event
from deltamem_tool.serve.openai.parameters import (
    MAX_MESSAGES,
    AnswerRequest,
    ChatMessage,
    MaxTokens,
    check_last_message,
    effective_parameters,
    idempotency_key,
)
from deltamem_tool.serve.request_memory import memory_of_request
from deltamem_tool.serve.service import disconnected_response, service_of
from deltamem_tool.serve.store.memory_store import MAX_NAME
from deltamem_tool.serve.turns import RESPONSE_PREFIX, KeptResponse, Outcome, Request

MAX_METADATA = 16  # pairs, as in OpenAI's API


class InputMessage(ChatMessage):
    """A message of the input. An earlier output can be sent back unchanged."""

    type: Literal["message"] = "message"
    id: str | None = None
    status: str | None = None
    phase: str | None = None


class ResponseRequest(AnswerRequest):
    """The body of a response."""

    input: (
        Annotated[str, Field(min_length=1)]
        | Annotated[list[InputMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    )
    instructions: str | None = None
    max_output_tokens: MaxTokens | None = None
    metadata: Annotated[
        dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
        Field(max_length=MAX_METADATA),
    ] | None = None  # fmt: skip
    previous_response_id: Annotated[str, Field(min_length=1, max_length=100)] | None = None
    store: bool = Field(default=True, description="Whether later requests can continue from the response.")
    truncation: Literal["auto", "disabled"] | None = None


async def create(http: HttpRequest) -> Response:
    """`POST /v1/responses`."""
    service = service_of(http)
    tenant = service.tenant_of(http)
    body = validate(ResponseRequest, effective_parameters(await read_object(http), set(ResponseRequest.model_fields)))
    service.check_model(body.model)
    content = body.input
    messages = (
        [{"role": "user", "content": content}] if isinstance(content, str) else [part.message() for part in content]
    )
    check_last_message(messages)
    draft = _draft(RESPONSE_PREFIX + secrets.token_hex(24), service.model, body)
    request = Request(
        memory_of_request(tenant, http.headers, body.user, body.memory),
        messages,
        body.sampling(body.max_output_tokens),
        previous=body.previous_response_id,
        keep=KeptResponse(draft["id"], partial(_finished_response, draft)) if body.store else None,
        instructions=body.instructions,
        key=idempotency_key(http.headers),
    )
    if not body.stream:
        outcome = await service.complete(http, request)
        return disconnected_response() if outcome is None else JSONResponse(_finished_response(draft, outcome))
    events = service.turns.answer(request)
    first = await service.first_event(http, events)
    return disconnected_response() if first is None else EventStream(_events(draft, first, events))


async def retrieve(http: HttpRequest) -> Response:
    """`GET /v1/responses/{id}`: a stored response, as it was sent."""
    service = service_of(http)
    tenant, id = service.tenant_of(http), _id(http)
    parameters = [name.removesuffix("[]") for name, value in http.query_params.items() if value != "false"]
    unsupported = next((name for name in parameters if name in ("include", "starting_after", "stream")), None)
    if unsupported is not None:
        raise RequestError(
            f"{unsupported} is not supported.",
            "A response is returned whole.",
            "Leave it out.",
            code="unsupported_parameter",
            param=unsupported,
        )
    stored = await run_sync(service.store.get_response, tenant, id)
    if stored is None:
        raise _not_found_error(id)
    return JSONResponse(stored.transcript["response"])


async def delete(http: HttpRequest) -> Response:
    """`DELETE /v1/responses/{id}`."""
    service = service_of(http)
    tenant, id = service.tenant_of(http), _id(http)
    await run_sync(service.store.delete_response, tenant, id)
    service.scheduler.forget(tenant, [id])
    return JSONResponse({"id": id, "object": "response", "deleted": True})


def _id(http: HttpRequest) -> str:
    id: str = http.path_params["id"]
    if not id.startswith(RESPONSE_PREFIX) or not id.isprintable() or len(id) > MAX_NAME:
        raise _not_found_error(id)
    return id


def _not_found_error(id: str) -> RequestError:
    return RequestError(f"Response with id {id!r} not found.", status=404, code="response_not_found")


def _draft(id: str, model: str, body: ResponseRequest) -> dict[str, Any]:
    """Return a response without an answer."""
    return {
        "id": id,
        "object": "response",
        "created_at": time.time(),
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "model": model,
        "output": [],
        "parallel_tool_calls": False,
        "previous_response_id": body.previous_response_id,
        "store": body.store,
        "temperature": body.temperature,
        "text": {"format": {"type": "text"}},
        "tool_choice": "none",
        "tools": [],
        "top_p": body.top_p,
        "truncation": body.truncation or "auto",
        "usage": None,
        "user": body.user,
    }


def _item(draft: dict[str, Any], text: str, status: str) -> dict[str, Any]:
    """Return the only output item of a response, a message."""
    parts = [] if status == "in_progress" else [_part(text)]
    id = f"msg_{draft['id'].removeprefix(RESPONSE_PREFIX)}"
    return {"id": id, "type": "message", "status": status, "role": "assistant", "content": parts}


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _finished_response(draft: dict[str, Any], outcome: Outcome) -> dict[str, Any]:
    completion = outcome.completion
    status = "incomplete" if completion.answer.why == LENGTH else "completed"
    answer = len(completion.answer.tokens)
    return {
        **draft,
        "status": status,
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        "output": [_item(draft, completion.answer.text, status)],
        "usage": {
            "input_tokens": completion.prompt_tokens,
            "input_tokens_details": {"cached_tokens": completion.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": answer,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": completion.prompt_tokens + answer,
        },
        "deltamem": outcome.report,
    }


async def _events(
    draft: dict[str, Any], first: str | Outcome, events: AsyncGenerator[str | Outcome, None]
) -> AsyncGenerator[bytes, None]:
    """Yield the events of a stream. The last one comes when the memory is stored; a failure replaces it."""
    numbers = iter(range(10**9))
    item = _item(draft, "", "in_progress")
    place = {"item_id": item["id"], "output_index": 0, "content_index": 0}

    def encode(type: str, **fields: Any) -> bytes:
        return encode_event({"type": type, "sequence_number": next(numbers), **fields}, type)

    try:
        async with aclosing(events):
            yield encode("response.created", response=draft)
            yield encode("response.in_progress", response=draft)
            yield encode("response.output_item.added", output_index=0, item=item)
            yield encode("response.content_part.added", **place, part=_part(""))
            if isinstance(first, str):
                yield encode("response.output_text.delta", **place, delta=first, logprobs=[])
                async for piece in events:
                    if not isinstance(piece, str):
                        first = piece
                        break
                    yield encode("response.output_text.delta", **place, delta=piece, logprobs=[])
        assert not isinstance(first, str)
        response = _finished_response(draft, first)
        text = first.completion.answer.text
        yield encode("response.output_text.done", **place, text=text, logprobs=[])
        yield encode("response.content_part.done", **place, part=_part(text))
        yield encode("response.output_item.done", output_index=0, item=response["output"][0])
        yield encode(f"response.{response['status']}", response=response)
    except DeltaMemError as error:
        payload = failure_of(error).body["error"]
        failure = {"code": payload["code"] or "server_error", "message": payload["message"]}
        yield encode("response.failed", response={**draft, "status": "failed", "error": failure})

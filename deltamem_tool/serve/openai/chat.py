"""The endpoint `POST /v1/chat/completions`, with or without streaming."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any

from pydantic import Field
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from deltamem_tool.chat.generation import LENGTH
from deltamem_tool.errors import DeltaMemError
from deltamem_tool.serve.body import read_object, validate
from deltamem_tool.serve.errors import failure_of
from deltamem_tool.serve.events import EventStream, encode_event, event_encoder
from deltamem_tool.serve.openai.parameters import (
    MAX_MESSAGES,
    MAX_STOP,
    AnswerRequest,
    ChatMessage,
    MaxTokens,
    check_last_message,
    effective_parameters,
    idempotency_key,
)
from deltamem_tool.serve.request_memory import memory_of_request
from deltamem_tool.serve.service import disconnected_response, service_of
from deltamem_tool.serve.turns import Outcome, Request

Stop = Annotated[str, Field(min_length=1, max_length=1000)]


class ChatRequest(AnswerRequest):
    """The body of a chat completion."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: MaxTokens | None = None
    max_completion_tokens: MaxTokens | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOP)] | None = None


async def complete(http: HttpRequest) -> Response:
    """`POST /v1/chat/completions`."""
    service = service_of(http)
    tenant = service.tenant_of(http)
    body = validate(ChatRequest, effective_parameters(await read_object(http), set(ChatRequest.model_fields)))
    service.check_model(body.model)
    messages = [message.message() for message in body.messages]
    check_last_message(messages)
    request = Request(
        memory_of_request(tenant, http.headers, body.user, body.memory),
        messages,
        body.sampling(body.max_completion_tokens or body.max_tokens, body.stop),
        key=idempotency_key(http.headers),
    )
    head = {"id": f"chatcmpl-{secrets.token_hex(16)}", "created": int(time.time()), "model": service.model}
    if not body.stream:
        outcome = await service.complete(http, request)
        return disconnected_response() if outcome is None else JSONResponse(_completion(head, outcome))
    events = service.turns.answer(request)
    usage = body.stream_options is not None and bool(body.stream_options.include_usage)
    # An invalid request is answered with an error status, before the stream begins.
    first = await service.first_event(http, events)
    return disconnected_response() if first is None else EventStream(_chunks(head, first, events, usage))


def _completion(head: dict[str, Any], outcome: Outcome) -> dict[str, Any]:
    message = {"role": "assistant", "content": outcome.completion.answer.text, "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": _finish_reason(outcome)}
    return {
        **head,
        "object": "chat.completion",
        "choices": [choice],
        "usage": _usage(outcome),
        "deltamem": outcome.report,
    }


async def _chunks(
    head: dict[str, Any], first: str | Outcome, events: AsyncGenerator[str | Outcome, None], usage: bool
) -> AsyncGenerator[bytes, None]:
    """Yield the chunks of a stream. The last ones come when the memory is stored; an error replaces them."""

    def chunk(delta: dict[str, Any], finish_reason: str | None = None, **others: Any) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return {**head, "object": "chat.completion.chunk", "choices": [choice], **no_usage, **others}

    no_usage = {"usage": None} if usage else {}  # if the last chunk has it, OpenAI's others have null
    of_piece = event_encoder(lambda piece: chunk({"content": piece}))

    try:
        async with aclosing(events):
            yield encode_event(chunk({"role": "assistant", "content": "", "refusal": None}))
            if isinstance(first, str):
                yield of_piece(first)
                async for piece in events:
                    if not isinstance(piece, str):
                        first = piece
                        break
                    yield of_piece(piece)
        assert not isinstance(first, str)
        yield encode_event(chunk({}, _finish_reason(first), deltamem=first.report))
        if usage:
            yield encode_event({**head, "object": "chat.completion.chunk", "choices": [], "usage": _usage(first)})
    except DeltaMemError as error:
        yield encode_event(failure_of(error).body)
    yield encode_event("[DONE]")


def _finish_reason(outcome: Outcome) -> str:
    return "length" if outcome.completion.answer.why == LENGTH else "stop"


def _usage(outcome: Outcome) -> dict[str, Any]:
    completion = outcome.completion
    answer = len(completion.answer.tokens)
    return {
        "prompt_tokens": completion.prompt_tokens,
        "completion_tokens": answer,
        "total_tokens": completion.prompt_tokens + answer,
        "prompt_tokens_details": {"cached_tokens": completion.cached_tokens},
    }

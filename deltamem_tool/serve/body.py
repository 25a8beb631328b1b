"""Read request bodies within limits, parse them as JSON, and validate their fields."""

from __future__ import annotations

import asyncio
from typing import Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError
from starlette.requests import ClientDisconnect, Request

from deltamem_tool.io.safe_json import parse_json
from deltamem_tool.segments.messages import is_unicode
from deltamem_tool.serve.errors import RequestError

MAX_BODY_BYTES = 4 * 2**20  # a conversation of a million tokens, or the memory of the largest model
BODY_SECONDS = 30.0  # time limit for receiving a whole body
SHOWN_PROBLEMS = 3

Model = TypeVar("Model", bound="Body")


def _as_integer(value: Any) -> Any:
    """Convert a float without a fraction to int: 5.0 is an integer in JSON."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


AS_INTEGER = BeforeValidator(_as_integer)  # annotates an integer field, after its bounds


class Body(BaseModel):
    """Base class of request bodies, which accept only their declared fields."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


async def read_bytes(request: Request, limit: int = MAX_BODY_BYTES) -> bytes:
    """Return the body of a request.

    Raises:
        RequestError: the body is larger than `limit`, or does not arrive in time.
    """
    chunks: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                size += len(chunk)
                if size > limit:
                    raise RequestError(
                        "The body is too large.",
                        f"At most {limit} bytes are accepted.",
                        "Send less.",
                        status=413,
                        code="body_too_large",
                    )
                chunks.append(chunk)
    except TimeoutError as error:
        raise RequestError(
            "The body did not arrive in time.", f"The limit is {BODY_SECONDS:g} seconds.", "Send it again.", status=408
        ) from error
    except ClientDisconnect as error:
        raise RequestError("The client disconnected.", "The body is incomplete.", "Send it again.") from error
    return b"".join(chunks)


async def read_object(request: Request) -> dict[str, Any]:
    """Return the body of a request, which must be a JSON object.

    Raises:
        RequestError: the body is not a JSON object, is nested too deeply or too large, or contains half of a surrogate
            pair.
    """
    content = await read_bytes(request)
    try:
        value = parse_json(content)
    except ValueError as error:
        raise RequestError(
            "The body is not valid JSON.", f"{str(error).rstrip('.')}.", "Correct it.", code="invalid_json"
        ) from error
    if not isinstance(value, dict):
        raise RequestError("The body is not a JSON object.", "", "Send an object.", code="invalid_json")
    if not _is_unicode(value):
        raise RequestError(
            "The body is not Unicode text.",
            "It contains half of a surrogate pair.",
            "Correct it.",
            code="invalid_json",
        )
    return value


def validate(model: type[Model], fields: dict[str, Any]) -> Model:
    """Validate `fields` and return them as a `model`.

    Raises:
        RequestError: a field is unknown, missing or of the wrong type. `param` names the first such field.
    """
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        raise _validation_error(error) from error


def _validation_error(error: ValidationError) -> RequestError:
    details = error.errors(include_url=False, include_input=False, include_context=False)
    first = details[0]
    problems = [f"{_path(detail['loc'])}: {detail['msg']}" for detail in details[:SHOWN_PROBLEMS]]
    if len(details) > SHOWN_PROBLEMS:
        problems.append(f"and {len(details) - SHOWN_PROBLEMS} more")
    if first["type"] == "extra_forbidden":
        name = _path(first["loc"])
        return RequestError(
            f"The parameter {name} is unknown.", "This server does not have it.", "Leave it out.",
            code="unknown_parameter", param=name,
        )  # fmt: skip
    return RequestError(
        "The request is invalid.",
        f"{'; '.join(problems)}.",
        "Correct it.",
        code="invalid_value",
        param=_path(first["loc"]),
    )


def _path(location: tuple[int | str, ...]) -> str:
    return ".".join(map(str, location))


def _is_unicode(value: Any) -> bool:
    if isinstance(value, str):
        return is_unicode(value)
    if isinstance(value, dict):
        return all(_is_unicode(key) and _is_unicode(part) for key, part in value.items())
    return all(map(_is_unicode, value)) if isinstance(value, list) else True

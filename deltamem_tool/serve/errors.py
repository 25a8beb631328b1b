"""Errors of requests, and the response for every error: its HTTP status, and a body in OpenAI's format."""

from __future__ import annotations

from typing import Any, NamedTuple

from starlette.responses import JSONResponse

from deltamem_tool.errors import (
    ConfigError,
    DataError,
    DeltaMemError,
    ExportError,
    MemoryStateError,
)
from deltamem_tool.serve.batching.job import Cancelled, DeadlineExceeded, QueueFull
from deltamem_tool.serve.store import Conflict, NotFound, QuotaExceeded, StoreDamaged, StoreUnavailable

RETRY_SECONDS = 1  # enough for a batch of short answers


class RequestError(DeltaMemError):
    """A request that cannot be answered as it is.

    Args:
        what: what is wrong, as in every `DeltaMemError`; so are `why` and `next`.
        status: of HTTP.
        code: OpenAI's name of it, or ours.
        param: the field of the body that is wrong.
        headers: of the response.
    """

    def __init__(
        self,
        what: str,
        why: str = "",
        next: str = "",
        *,
        status: int = 400,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(what, why, next)
        self.status, self.code, self.param, self.headers = status, code, param, headers or {}


class _Kind(NamedTuple):
    status: int
    type: str
    code: str | None
    headers: dict[str, str] = {}  # noqa: RUF012  (read only)


_RETRY = {"Retry-After": str(RETRY_SECONDS)}
# The first match applies. OpenAI's clients automatically retry 408, 409, 429, and 500 and above.
_KINDS: tuple[tuple[type[DeltaMemError], _Kind], ...] = (
    (QueueFull, _Kind(429, "rate_limit_error", "queue_full", _RETRY)),
    (QuotaExceeded, _Kind(429, "insufficient_quota", "insufficient_quota", {"x-should-retry": "false"})),
    (DeadlineExceeded, _Kind(504, "server_error", "deadline_exceeded")),
    (Cancelled, _Kind(503, "server_error", "shutting_down", _RETRY)),
    (Conflict, _Kind(409, "conflict_error", "conflict")),
    (NotFound, _Kind(404, "invalid_request_error", "not_found")),
    (StoreUnavailable, _Kind(503, "server_error", "store_unavailable", _RETRY)),
    (StoreDamaged, _Kind(500, "server_error", "store_damaged")),
    (MemoryStateError, _Kind(400, "invalid_request_error", "invalid_memory")),
    (ConfigError, _Kind(400, "invalid_request_error", None)),
    (DataError, _Kind(400, "invalid_request_error", None)),
    (ExportError, _Kind(400, "invalid_request_error", None)),
)
_OTHERS = _Kind(500, "server_error", None)
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class Failure(NamedTuple):
    """An error as a client sees it."""

    status: int
    body: dict[str, Any]
    headers: dict[str, str]


def failure_of(error: DeltaMemError) -> Failure:
    """Return what a client is told about `error`."""
    if isinstance(error, RequestError):
        kind = _Kind(error.status, _type_of(error.status), error.code, error.headers)
    else:
        kind = next((kind for errors, kind in _KINDS if isinstance(error, errors)), _OTHERS)
    message = " ".join(part for part in (error.what, error.why, error.next) if part)
    param = error.param if isinstance(error, RequestError) else None
    details = {"message": message, "type": kind.type, "param": param, "code": kind.code}
    return Failure(kind.status, {"error": details}, kind.headers)


def error_response(error: DeltaMemError) -> JSONResponse:
    """Return the response for `error`."""
    failure = failure_of(error)
    return JSONResponse(failure.body, failure.status, failure.headers)


def _type_of(status: int) -> str:
    return _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")

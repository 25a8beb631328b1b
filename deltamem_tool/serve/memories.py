"""The endpoint `/v1/memories`: the memories of a tenant."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from anyio.to_thread import run_sync
from pydantic import Field, TypeAdapter, ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from deltamem_tool.errors import MemoryStateError
from deltamem_tool.memory.file import check_memory, memory_from_bytes
from deltamem_tool.serve.body import AS_INTEGER, Body, read_bytes, read_object, validate
from deltamem_tool.serve.errors import RequestError
from deltamem_tool.serve.names import MemoryName
from deltamem_tool.serve.service import Service, service_of
from deltamem_tool.serve.store import ANY, Conflict, ExpectedVersion, MemoryInfo, MemoryVersion, Receipt

MEDIA_TYPE = "application/vnd.safetensors"
PAGE = 100
MAX_PAGE = 1000
MAX_VERSION = 2**53

T = TypeVar("T")
Version = Annotated[int, Field(ge=1, le=MAX_VERSION), AS_INTEGER]
_NAME, _VERSION = TypeAdapter(MemoryName), TypeAdapter(Version)
_LIMIT = TypeAdapter(Annotated[int, Field(ge=1, le=MAX_PAGE)])
_SECONDS = TypeAdapter(Annotated[float, Field(gt=0, allow_inf_nan=False)])  # JSON has no infinity


class ForkRequest(Body):
    """Body of a fork: the name of the copy."""

    id: MemoryName
    version: Version | None = Field(default=None, description="The version to copy; by default the newest.")


class RestoreRequest(Body):
    """Body of a restore: the version to restore."""

    version: Version


async def list_memories(request: Request) -> Response:
    """`GET /v1/memories`: one page of the memories, ordered by name."""
    service, tenant = _tenant(request)
    limit = _query(request, "limit", _LIMIT) or PAGE
    after = _query(request, "after", _NAME)
    memories = await run_sync(service.store.list, tenant, after, limit + 1)
    usage = await run_sync(service.store.usage, tenant)
    page = [_info(memory) for memory in memories[:limit]]
    return JSONResponse(
        {
            "object": "list",
            "data": page,
            "first_id": page[0]["id"] if page else None,
            "last_id": page[-1]["id"] if page else None,
            "has_more": len(memories) > limit,
            "usage": dataclasses.asdict(usage),
        }
    )


async def get_memory(request: Request) -> Response:
    """`GET /v1/memories/{id}`: the memory file, or its metadata as JSON if the client accepts only JSON."""
    service, tenant = _tenant(request)
    id, version = _id(request), _query(request, "version", _VERSION)
    stored = await run_sync(service.store.get, tenant, id, version)
    if stored is None:
        raise _not_found_error()
    headers = _headers(stored)
    if _names(request, "if-none-match", stored):
        return Response(status_code=304, headers=headers)
    if request.headers.get("accept", "").strip() == "application/json":
        return JSONResponse(_info(stored), headers=headers)
    return Response(stored.data, media_type=MEDIA_TYPE, headers=headers)


async def put_memory(request: Request) -> Response:
    """`PUT /v1/memories/{id}`: create or replace a memory from a memory file."""
    service, tenant = _tenant(request)
    id, expires_in = _id(request), _query(request, "expires_in", _SECONDS)
    data = await read_bytes(request)
    await run_sync(_check, service, data)
    async with service.locks.hold(tenant, id):
        current = await run_sync(service.store.get, tenant, id)
        expected = _expected_version(request, current)
        expires_at = None if expires_in is None else time.time() + expires_in
        put = service.store.put
        stored = await _conditional(request, lambda: put(tenant, id, data, expected, None, expires_at))
    return JSONResponse(_info(stored), 201 if current is None else 200, _headers(stored))


async def delete_memory(request: Request) -> Response:
    """`DELETE /v1/memories/{id}`: delete a memory, its versions and the responses made with it; return a receipt."""
    service, tenant = _tenant(request)
    id = _id(request)
    async with service.locks.hold(tenant, id):
        current = await run_sync(service.store.get, tenant, id) if "if-match" in request.headers else None
        expected = _expected_version(request, current)
        receipt = await _conditional(request, lambda: service.store.delete(tenant, id, expected))
        service.scheduler.forget(tenant, (id, *receipt.responses))
    return JSONResponse(receipt_json(receipt))


async def list_versions(request: Request) -> Response:
    """`GET /v1/memories/{id}/versions`: the versions that are kept, newest first."""
    service, tenant = _tenant(request)
    versions = await run_sync(service.store.versions, tenant, _id(request))
    return JSONResponse({"object": "list", "data": [dataclasses.asdict(version) for version in versions]})


async def fork_memory(request: Request) -> Response:
    """`POST /v1/memories/{id}/fork`: copy a memory to a new one."""
    service, tenant = _tenant(request)
    id, body = _id(request), validate(ForkRequest, await read_object(request))
    stored = await run_sync(service.store.fork, tenant, id, body.id, body.version)
    return JSONResponse(_info(stored), 201, _headers(stored))


async def restore_memory(request: Request) -> Response:
    """`POST /v1/memories/{id}/restore`: make an earlier version the newest one."""
    service, tenant = _tenant(request)
    id, body = _id(request), validate(RestoreRequest, await read_object(request))
    async with service.locks.hold(tenant, id):
        current = await run_sync(service.store.get, tenant, id) if "if-match" in request.headers else None
        expected = _expected_version(request, current)
        stored = await _conditional(request, lambda: service.store.restore(tenant, id, body.version, expected))
    return JSONResponse(_info(stored), headers=_headers(stored))


def receipt_json(receipt: Receipt) -> dict[str, Any]:
    """Return the receipt of a deletion as JSON."""
    fields = dataclasses.asdict(receipt)
    del fields["tenant"]
    return {"object": "memory.deleted", "deleted": True, **fields}


def _tenant(request: Request) -> tuple[Service, str]:
    service = service_of(request)
    return service, service.tenant_of(request)


def _id(request: Request) -> str:
    return _valid("id", _NAME, request.path_params["id"])


def _query(request: Request, name: str, kind: TypeAdapter[T]) -> T | None:
    value = request.query_params.get(name)
    return None if value is None else _valid(name, kind, value)


def _valid(name: str, kind: TypeAdapter[T], value: str) -> T:
    try:
        return kind.validate_python(value)
    except ValidationError as error:
        why = error.errors(include_url=False, include_input=False, include_context=False)[0]["msg"]
        raise RequestError(f"{name} is invalid.", f"{why}.", "Correct it.", code="invalid_value", param=name) from error


def _check(service: Service, data: bytes) -> None:
    """Check that the bytes are a memory of one conversation that belongs to the model's adapter."""
    engine = service.scheduler.engine
    memory = memory_from_bytes(data, "The body")
    check_memory(memory.shape, memory.adapter, engine.memory_shape, engine.adapter)
    rows = {len(tensor) for tensor in memory.tensors().values()}
    if rows != {1}:
        raise MemoryStateError("The body is not a single memory.", f"It has {max(rows)} rows.", "Send one row.")


def _etag(memory: MemoryInfo) -> str:
    return f'"{memory.digest}"'


def _headers(memory: MemoryInfo) -> dict[str, str]:
    return {"ETag": _etag(memory), "X-Deltamem-Version": str(memory.version)}


def _names(request: Request, header: str, memory: MemoryInfo | None) -> bool:
    """Whether the header, If-Match or If-None-Match, matches the ETag of the memory, or is `*` and it exists."""
    tags = [tag.strip().removeprefix("W/") for tag in request.headers.get(header, "").split(",")]
    return memory is not None and ("*" in tags or _etag(memory) in tags)


def _expected_version(request: Request, current: MemoryVersion | None) -> ExpectedVersion:
    """The version that a change expects, according to the headers `If-Match` and `If-None-Match`.

    Raises:
        RequestError: the memory already has another version.
    """
    has_match = "if-match" in request.headers
    if (has_match and not _names(request, "if-match", current)) or _names(request, "if-none-match", current):
        raise _precondition_error()
    if has_match:
        assert current is not None
        return current.version
    return None if "if-none-match" in request.headers else ANY


async def _conditional(request: Request, change: Callable[[], T]) -> T:
    """Return the result of `change`. If a conditional request loses a race, its condition has failed."""
    try:
        return await run_sync(change)
    except Conflict as error:
        if "if-match" in request.headers or "if-none-match" in request.headers:
            raise _precondition_error() from error
        raise


def _precondition_error() -> RequestError:
    return RequestError(
        "The memory is not in the state that the request expects.",
        "It has been changed, created or deleted since.",
        "Fetch it again.",
        status=412,
        code="precondition_failed",
    )


def _not_found_error() -> RequestError:
    return RequestError(
        "There is no such memory or version.",
        "It never existed, was deleted, or has expired.",
        "",
        status=404,
        code="memory_not_found",
    )


def _info(memory: MemoryInfo) -> dict[str, Any]:
    return {
        "id": memory.id,
        "object": "memory",
        "version": memory.version,
        "digest": memory.digest,
        "bytes": memory.size,
        "created_at": memory.created_at,
        "updated_at": memory.updated_at,
        "expires_at": memory.expires_at,
    }

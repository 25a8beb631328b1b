"""The endpoints `/openapi.json`, which describes the API, and `/docs`, which shows the same as a page."""

from __future__ import annotations

import functools
import html
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse

from deltamem_tool._version import __version__
from deltamem_tool.serve import response_schemas
from deltamem_tool.serve.memories import MAX_PAGE, MEDIA_TYPE, ForkRequest, RestoreRequest
from deltamem_tool.serve.names import NAME_SCHEMA
from deltamem_tool.serve.openai.chat import ChatRequest
from deltamem_tool.serve.openai.parameters import KEY_HEADER
from deltamem_tool.serve.openai.responses import ResponseRequest
from deltamem_tool.serve.request_memory import HEADER
from deltamem_tool.serve.store.memory_store import MAX_NAME

_REFERENCE = "#/components/schemas/{model}"
_BYTES = {MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}}}


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _streamed(schema: dict[str, Any]) -> dict[str, Any]:
    return {**_json(schema), "text/event-stream": {"schema": response_schemas.EVENT}}


class _Operation(NamedTuple):
    """The description of one method of a path."""

    method: str
    path: str
    summary: str
    content: dict[str, Any]
    errors: Sequence[int] = ()
    status: int = 200
    body: type[BaseModel] | dict[str, Any] | None = None
    parameters: Sequence[dict[str, Any]] = ()
    open: bool = False  # without a key


def _query(name: str, **schema: Any) -> dict[str, Any]:
    return {"name": name, "in": "query", "required": False, "schema": schema}


def _header(name: str, **schema: Any) -> dict[str, Any]:
    return {"name": name, "in": "header", "required": False, "schema": {"type": "string", **schema}}


_MEMORY = _header(HEADER, minLength=1, maxLength=MAX_NAME)
_KEY = _header(KEY_HEADER)
_IF_MATCH, _IF_NONE = _header("If-Match"), _header("If-None-Match")
_CHANGES = (404, 409, 412, 429, 503)
_OPERATIONS = (
    _Operation(
        "post", "/v1/chat/completions", "Answer a conversation, from a memory.", _streamed(response_schemas.COMPLETION),
        (404, 409, 429, 503, 504), body=ChatRequest, parameters=(_MEMORY, _KEY),
    ),
    _Operation(
        "post", "/v1/responses", "Answer, and keep a snapshot to continue from.", _streamed(response_schemas.RESPONSE),
        (404, 409, 429, 503, 504), body=ResponseRequest, parameters=(_MEMORY, _KEY),
    ),
    _Operation("get", "/v1/responses/{id}", "Get a stored response.", _json(response_schemas.RESPONSE), (404, 503)),
    _Operation(
        "delete", "/v1/responses/{id}", "Delete a snapshot.", _json(response_schemas.RESPONSE_DELETED), (404, 503)
    ),
    _Operation("get", "/v1/models", "List the served model.", _json(response_schemas.MODELS)),
    _Operation("get", "/v1/models/{model}", "Get the model.", _json(response_schemas.MODEL), (404,)),
    _Operation(
        "get", "/v1/memories", "List the memories.", _json(response_schemas.MEMORIES), (503,),
        parameters=(_query("after", **NAME_SCHEMA), _query("limit", type="integer", minimum=1, maximum=MAX_PAGE)),
    ),
    _Operation(
        "get", "/v1/memories/{id}", "Get a memory file.", {**_BYTES, **_json(response_schemas.MEMORY)}, (304, 404, 503),
        parameters=(_query("version", type="integer", minimum=1), _IF_NONE),
    ),
    _Operation(
        "put", "/v1/memories/{id}", "Create or replace a memory from a memory file.", _json(response_schemas.MEMORY),
        (201, *_CHANGES),
        body=_BYTES, parameters=(_query("expires_in", type="number", exclusiveMinimum=0), _IF_MATCH, _IF_NONE),
    ),
    _Operation(
        "delete", "/v1/memories/{id}", "Delete a memory, its versions and its responses; return a receipt.",
        _json(response_schemas.RECEIPT), _CHANGES, parameters=(_IF_MATCH, _IF_NONE),
    ),
    _Operation(
        "get", "/v1/memories/{id}/versions", "List the versions of a memory.", _json(response_schemas.VERSIONS),
        (404, 503),
    ),
    _Operation(
        "post", "/v1/memories/{id}/fork", "Copy a memory to a new one.", _json(response_schemas.MEMORY), _CHANGES, 201,
        body=ForkRequest,
    ),
    _Operation(
        "post", "/v1/memories/{id}/restore", "Make an earlier version the newest one.", _json(response_schemas.MEMORY),
        _CHANGES, body=RestoreRequest, parameters=(_IF_MATCH, _IF_NONE),
    ),
    _Operation("get", "/health", "Whether the process is running.", _json(response_schemas.STATUS), open=True),
    _Operation("get", "/ready", "Whether the server can answer.", _json(response_schemas.STATUS), (503,), open=True),
    _Operation(
        "get", "/metrics", "Metrics for Prometheus.", {"text/plain": {"schema": {"type": "string"}}}, open=True
    ),
)  # fmt: skip


@functools.cache
def document() -> dict[str, Any]:
    """Return the OpenAPI document."""
    schemas: dict[str, Any] = {"Error": response_schemas.ERROR}
    paths: dict[str, dict[str, Any]] = {}
    for operation in _OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method] = _describe(operation, schemas)
    return {
        "openapi": "3.1.0",
        "info": {"title": "deltamem serve", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _describe(operation: _Operation, schemas: dict[str, Any]) -> dict[str, Any]:
    named = [part[1:-1] for part in operation.path.split("/") if part.startswith("{")]
    described: dict[str, Any] = {
        "summary": operation.summary,
        "operationId": f"{operation.method} {operation.path}",
        "parameters": [
            *({"name": name, "in": "path", "required": True, "schema": NAME_SCHEMA} for name in named),
            *operation.parameters,
        ],
        "responses": {str(operation.status): _answer(operation.status, operation.content)},
    }
    of_key = () if operation.open else (400, 401)
    of_body = () if operation.body is None else (408, 413)
    for status in sorted({403, 431, *of_key, *of_body, *operation.errors}):
        described["responses"][str(status)] = _answer(status, operation.content)
    if not operation.open:
        described["security"] = [{"key": []}, {}]
    if isinstance(operation.body, dict):
        described["requestBody"] = {"required": True, "content": operation.body}
    elif operation.body is not None:
        schema = operation.body.model_json_schema(ref_template=_REFERENCE)
        schemas.update(schema.pop("$defs", {}))
        schemas[operation.body.__name__] = schema
        reference = {"$ref": _REFERENCE.format(model=operation.body.__name__)}
        described["requestBody"] = {"required": True, "content": {"application/json": {"schema": reference}}}
    return described


def _answer(status: int, content: dict[str, Any]) -> dict[str, Any]:
    if status < 300:
        return {"description": "Done.", "content": content}
    if status < 400:
        return {"description": "Not modified."}
    return {"description": "An error.", "content": _json({"$ref": _REFERENCE.format(model="Error")})}


async def openapi(request: Request) -> JSONResponse:
    """`GET /openapi.json`."""
    return JSONResponse(document())


async def docs(request: Request) -> HTMLResponse:
    """`GET /docs`: the document as a page without external resources."""
    schemas = document()["components"]["schemas"]
    parts = []
    for operation in _OPERATIONS:
        title = f"<h2><code>{operation.method.upper()} {operation.path}</code></h2><p>{html.escape(operation.summary)}"
        names = ", ".join(f"{parameter['name']} ({parameter['in']})" for parameter in operation.parameters)
        body = ""
        if isinstance(operation.body, type):
            schema = json.dumps(schemas[operation.body.__name__]["properties"], indent=2)
            body = f"<details><summary>Body</summary><pre>{html.escape(schema)}</pre></details>"
        parts.append(f"{title} {html.escape(names)}</p>{body}")
    page = f"<!doctype html><html lang=en><meta charset=utf-8><title>deltamem serve</title>{_STYLE}"
    return HTMLResponse(f"{page}<h1>deltamem serve {__version__}</h1><p>{_ABOUT}</p>{''.join(parts)}")


_STYLE = "<style>body{font:16px sans-serif;max-width:52rem;margin:2rem auto;padding:0 1rem}pre{overflow:auto}</style>"
_ABOUT = 'OpenAI\'s API, with memories. OpenAPI document: <a href="/openapi.json">openapi.json</a>.'

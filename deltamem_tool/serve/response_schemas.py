"""JSON Schemas of the responses, for the OpenAPI document."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]


def _object(**properties: Schema) -> Schema:
    return {"type": "object", "required": list(properties), "properties": properties}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _or_null(kind: str) -> Schema:
    return {"type": [kind, "null"]}


_TEXT, _INTEGER, _NUMBER, _BOOLEAN = ({"type": kind} for kind in ("string", "integer", "number", "boolean"))
_LIST = {"const": "list"}
_VERSION = _object(version=_INTEGER, digest=_TEXT, size=_INTEGER, created_at=_NUMBER)
_REPORT = _object(
    memory=_or_null("string"),
    version=_or_null("integer"),
    messages_written=_INTEGER,
    answer_written=_BOOLEAN,
    messages_dropped=_INTEGER,
)

ERROR = _object(error=_object(message=_TEXT, type=_TEXT, param=_or_null("string"), code=_or_null("string")))
MEMORY = _object(
    id=_TEXT,
    object={"const": "memory"},
    version=_INTEGER,
    digest=_TEXT,
    bytes=_INTEGER,
    created_at=_NUMBER,
    updated_at=_NUMBER,
    expires_at=_or_null("number"),
)
MEMORIES = _object(
    object=_LIST,
    data=_list(MEMORY),
    first_id=_or_null("string"),
    last_id=_or_null("string"),
    has_more=_BOOLEAN,
    usage=_object(memories=_INTEGER, bytes=_INTEGER),
)
VERSIONS = _object(object=_LIST, data=_list(_VERSION))
RECEIPT = _object(
    object={"const": "memory.deleted"},
    deleted={"const": True},
    id=_TEXT,
    versions=_list(_VERSION),
    responses=_list(_TEXT),
    deleted_at=_NUMBER,
    erased=_BOOLEAN,
)
MODEL = _object(
    id=_TEXT,
    object={"const": "model"},
    created=_INTEGER,
    owned_by=_TEXT,
    adapter=_TEXT,
    context_window=_or_null("integer"),
)
MODELS = _object(object=_LIST, data=_list(MODEL))
# OpenAI's objects, abbreviated: https://platform.openai.com/docs/api-reference
COMPLETION = _object(
    id=_TEXT,
    object={"const": "chat.completion"},
    created=_INTEGER,
    model=_TEXT,
    choices=_list({"type": "object"}),
    usage={"type": "object"},
    deltamem=_REPORT,
)
RESPONSE = _object(
    id=_TEXT,
    object={"const": "response"},
    created_at=_NUMBER,
    status={"enum": ["completed", "incomplete"]},
    model=_TEXT,
    output=_list({"type": "object"}),
    usage={"type": "object"},
    deltamem=_REPORT,
)
RESPONSE_DELETED = _object(id=_TEXT, object={"const": "response"}, deleted={"const": True})
STATUS = _object(status=_TEXT)
EVENT = {"type": "object", "required": ["data"], "properties": {"event": _TEXT, "data": _TEXT}}  # one event of a stream

"""Validation of memory names, which must fit into URLs and logs."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, StringConstraints, WithJsonSchema

from deltamem_tool.serve.store.memory_store import MAX_NAME

# `check_name` as a regular expression of JSON Schema's: the space is the only one of its kind that is printable.
NAME_SCHEMA: dict[str, Any] = {
    "type": "string",
    "minLength": 1,
    "maxLength": MAX_NAME,
    "pattern": r"^(?!\.\.?$)([^/\p{C}\p{Z}]| )+$",
}


def check_name(name: str) -> str:
    """Return `name` if it can be a memory's.

    Raises:
        ValueError: it cannot be part of a path.
    """
    if not name.isprintable() or "/" in name or name in (".", ".."):
        raise ValueError("a memory name consists of printable characters and contains no slash")
    return name


MemoryName = Annotated[
    str,
    StringConstraints(min_length=1, max_length=MAX_NAME),
    AfterValidator(check_name),
    WithJsonSchema(NAME_SCHEMA),
]

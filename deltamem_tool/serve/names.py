"""Validation of memory names, which must fit into URLs and logs."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, StringConstraints, WithJsonSchema

from deltamem_tool.serve.store.memory_store import MAX_NAME

# `check_name` as a regular expression for JSON Schema. The space is the only printable separator.
NAME_SCHEMA: dict[str, Any] = {
    "type": "string",
    "minLength": 1,
    "maxLength": MAX_NAME,
    "pattern": r"^(?!\.\.?$)([^/\p{C}\p{Z}]| )+$",
}


def check_name(name: str) -> str:
    """Return `name` if it is a valid memory name.

    Raises:
        ValueError: the name cannot be part of a URL path.
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

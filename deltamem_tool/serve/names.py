"""Names of memories: what a URL and a log can hold."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, StringConstraints

from deltamem_tool.serve.store.memory_store import MAX_NAME


def check_name(name: str) -> str:
    """Return `name` if it can be a memory's.

    Raises:
        ValueError: it cannot be part of a path.
    """
    if not name.isprintable() or "/" in name or name in (".", ".."):
        raise ValueError("the name of a memory has printable characters, and no slash")
    return name


MemoryName = Annotated[str, StringConstraints(min_length=1, max_length=MAX_NAME), AfterValidator(check_name)]

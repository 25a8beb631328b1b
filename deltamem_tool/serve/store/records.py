"""The records that a store returns. Times are seconds since 1970 in UTC; sizes are bytes before encryption."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final, Literal


class Expected(Enum):
    """The type of `ANY`."""

    ANY = "any"


ANY: Final = Expected.ANY  # any version, or none
ExpectedVersion = int | Literal[Expected.ANY] | None  # None: the memory must not exist


@dataclass(frozen=True)
class VersionInfo:
    """One version of a memory, without its content.

    Args:
        version: a number that increases with every version. No later memory with the same id uses it again.
        digest: SHA-256 of the content, in hexadecimal.
    """

    version: int
    digest: str
    size: int
    created_at: float


@dataclass(frozen=True)
class MemoryInfo:
    """A memory without its content. `version`, `digest` and `size` are those of its newest version.

    Args:
        created_at: when the memory was created.
        updated_at: when this version was written.
        expires_at: when the memory expires; None for never.
    """

    id: str
    version: int
    digest: str
    size: int
    created_at: float
    updated_at: float
    expires_at: float | None


@dataclass(frozen=True)
class MemoryVersion(MemoryInfo):
    """A version of a memory, with its content.

    Args:
        data: content of a memory file.
        turn: what the memory has been fed of a conversation, as its writer recorded it.
    """

    data: bytes
    turn: Mapping[str, Any] | None


@dataclass(frozen=True)
class StoredResponse:
    """The memory after a response, and the conversation that continues from there.

    Args:
        memory: id of the memory that the response was made with, or None. If that memory is deleted, so is the
            response.
        data: content of a memory file.
        transcript: the conversation, as its writer recorded it.
    """

    id: str
    memory: str | None
    digest: str
    created_at: float
    expires_at: float | None
    data: bytes
    transcript: Any


@dataclass(frozen=True)
class Receipt:
    """A record of what was deleted, without its content.

    Args:
        id: id of the memory; None if a single response was deleted.
        versions: number of versions of the memory.
        responses: ids of the responses that were deleted with it.
        erased: whether the content is also gone from the database's files. PostgreSQL cannot guarantee that. Neither
            can SQLite while another program reads from the file.
    """

    tenant: str
    id: str | None
    versions: tuple[VersionInfo, ...]
    responses: tuple[str, ...]
    deleted_at: float
    erased: bool


@dataclass(frozen=True)
class Usage:
    """The storage used by a tenant: number of memories, and bytes of all their versions and of responses."""

    memories: int
    bytes: int


@dataclass(frozen=True)
class Quota:
    """The maximum storage of a tenant; None for no limit."""

    memories: int | None = None
    bytes: int | None = None

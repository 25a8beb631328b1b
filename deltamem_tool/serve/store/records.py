"""The records that a store returns. Times are seconds since 1970 in UTC; sizes are bytes before encryption."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final, Literal


class Expected(Enum):
    """See `ANY`."""

    ANY = "any"


ANY: Final = Expected.ANY  # whatever version there is, or none
ExpectedVersion = int | Literal[Expected.ANY] | None  # None: the memory must not exist


@dataclass(frozen=True)
class VersionInfo:
    """One version of a memory, without its content.

    Args:
        version: a number that grows with each version, and that no later memory of the same id has again.
        digest: SHA-256 of its bytes, in hexadecimal.
    """

    version: int
    digest: str
    size: int
    created_at: float


@dataclass(frozen=True)
class MemoryInfo:
    """A memory without its content; `version`, `digest` and `size` are those of its newest version.

    Args:
        created_at: when the memory was created.
        updated_at: when this version was written.
        expires_at: when it will be gone; None for never.
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
    """A version of a memory.

    Args:
        data: a memory file's bytes.
        turn: what of a conversation it has been fed, as its writer noted it.
    """

    data: bytes
    turn: Mapping[str, Any] | None


@dataclass(frozen=True)
class StoredResponse:
    """The memory after a response, and the conversation that goes on from there.

    Args:
        memory: id of the memory that it was made with, whose deletion deletes the response too; None for none.
        data: a memory file's bytes.
        transcript: the conversation, as its writer noted it.
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
    """What was deleted, without its content.

    Args:
        id: of the memory; None where one response was deleted.
        versions: of the memory.
        responses: ids of the responses that went with it.
        erased: whether the content is out of the database's files too. PostgreSQL cannot promise it, and SQLite not
            while another program reads from the file.
    """

    tenant: str
    id: str | None
    versions: tuple[VersionInfo, ...]
    responses: tuple[str, ...]
    deleted_at: float
    erased: bool


@dataclass(frozen=True)
class Usage:
    """What a tenant stores: memories, and bytes of all their versions and of responses."""

    memories: int
    bytes: int


@dataclass(frozen=True)
class Quota:
    """The most that a tenant may store; None for no bound."""

    memories: int | None = None
    bytes: int | None = None

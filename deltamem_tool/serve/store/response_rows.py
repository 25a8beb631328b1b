"""Rows of responses, within a transaction."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, delete, insert, or_, select

from deltamem_tool.serve.store.content import digest_of, open_data, open_json, seal_json
from deltamem_tool.serve.store.encryption import Cipher
from deltamem_tool.serve.store.errors import Conflict
from deltamem_tool.serve.store.memory_rows import lock_memory
from deltamem_tool.serve.store.records import Quota, Receipt, StoredResponse
from deltamem_tool.serve.store.schema import responses
from deltamem_tool.serve.store.usage import check_quota, count


def write_response(
    connection: Connection,
    cipher: Cipher,
    *,
    tenant: str,
    id: str,
    data: bytes,
    transcript: Any,
    memory: tuple[str, int] | None,
    expires_at: float | None,
    now: float,
    quota: Quota,
) -> StoredResponse:
    """Add a response, made with the version of a memory that `memory` names.

    Raises:
        Conflict: that memory was deleted meanwhile.
        QuotaExceeded: it is more than `quota`.
    """
    if memory is not None:
        row = lock_memory(connection, tenant, memory[0], now)
        if row is None or not row.first_version <= memory[1] <= row.version:
            raise Conflict(
                f"The memory {memory[0]!r} was deleted meanwhile.",
                "The response was made with it.",
                "Nothing was written. Repeat the request.",
            )
    digest = digest_of(data)
    notes = seal_json(cipher, transcript, "transcript", tenant, id)
    size = len(data) + len(notes)
    name = None if memory is None else memory[0]
    connection.execute(
        insert(responses).values(
            tenant=tenant,
            id=id,
            memory=name,
            digest=digest,
            size=size,
            created_at=now,
            expires_at=expires_at,
            transcript=notes,
            data=cipher.seal(data, "response", tenant, id),
        )
    )
    check_quota(quota, count(connection, tenant, size=size))
    return StoredResponse(id, name, digest, now, expires_at, data, transcript)


def read_response(connection: Connection, cipher: Cipher, tenant: str, id: str, now: float) -> StoredResponse | None:
    """Return a response; None if there is none."""
    row = connection.execute(
        select(responses)
        .where(responses.c.tenant == tenant, responses.c.id == id)
        .where(or_(responses.c.expires_at.is_(None), responses.c.expires_at > now))
    ).one_or_none()
    if row is None:
        return None
    data = open_data(cipher, row.data, row.digest, "response", tenant, id)
    transcript = open_json(cipher, row.transcript, "transcript", tenant, id)
    return StoredResponse(id, row.memory, row.digest, row.created_at, row.expires_at, data, transcript)


def remove_response(connection: Connection, tenant: str, id: str, now: float) -> Receipt | None:
    """Delete a response; return None if there is none."""
    size = connection.execute(
        delete(responses).where(responses.c.tenant == tenant, responses.c.id == id).returning(responses.c.size)
    ).scalar_one_or_none()
    if size is None:
        return None
    count(connection, tenant, size=-size)
    return Receipt(tenant, None, (), (id,), now, erased=False)

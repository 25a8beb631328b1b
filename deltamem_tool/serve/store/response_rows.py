"""Rows of responses, within a transaction."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, delete, insert, or_, select

from deltamem_tool.serve.store.contents import Contents, remove_contents
from deltamem_tool.serve.store.errors import Conflict
from deltamem_tool.serve.store.memory_rows import lock_memory
from deltamem_tool.serve.store.records import Quota, Receipt, StoredResponse
from deltamem_tool.serve.store.schema import contents, responses
from deltamem_tool.serve.store.usage import check_quota, count

_COLUMNS = (responses.c.memory, responses.c.digest, responses.c.created_at, responses.c.expires_at)


def write_response(
    connection: Connection,
    form: Contents,
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
    """Add a response that was made with the memory version in `memory`.

    Raises:
        Conflict: that memory was deleted in the meantime.
        QuotaExceeded: the tenant would store more than `quota`.
    """
    if memory is not None:
        row = lock_memory(connection, tenant, memory[0], now)
        if row is None or not row.first_version <= memory[1] <= row.version:
            raise Conflict(
                f"The memory {memory[0]!r} was deleted in the meantime.",
                "The response was created with it.",
                "Nothing was written. Repeat the request.",
            )
    entry = form.write(connection, data, transcript, "response", tenant, id)
    name = None if memory is None else memory[0]
    connection.execute(
        insert(responses).values(
            tenant=tenant,
            id=id,
            memory=name,
            digest=entry.digest,
            size=entry.size,
            created_at=now,
            expires_at=expires_at,
            content=entry.key,
        )
    )
    check_quota(quota, count(connection, tenant, size=entry.size))
    return StoredResponse(id, name, entry.digest, now, expires_at, data, transcript)


def read_response(connection: Connection, form: Contents, tenant: str, id: str, now: float) -> StoredResponse | None:
    """Return a response, or None if it does not exist."""
    row = connection.execute(
        select(*_COLUMNS, contents.c.content)
        .join_from(responses, contents, contents.c.key == responses.c.content)
        .where(responses.c.tenant == tenant, responses.c.id == id)
        .where(or_(responses.c.expires_at.is_(None), responses.c.expires_at > now))
    ).one_or_none()
    if row is None:
        return None
    data, transcript = form.read(row.content, row.digest, "response", tenant, id)
    return StoredResponse(id, row.memory, row.digest, row.created_at, row.expires_at, data, transcript)


def remove_response(connection: Connection, tenant: str, id: str, now: float) -> Receipt | None:
    """Delete a response and return the receipt, or None if it does not exist."""
    row = connection.execute(
        delete(responses)
        .where(responses.c.tenant == tenant, responses.c.id == id)
        .returning(responses.c.size, responses.c.content)
    ).one_or_none()
    if row is None:
        return None
    remove_contents(connection, [row.content])
    count(connection, tenant, size=-row.size)
    return Receipt(tenant, None, (), (id,), now, erased=False)

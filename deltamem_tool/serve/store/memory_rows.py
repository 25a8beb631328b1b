"""Rows of memories and of their versions, within a transaction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import BindParameter, ColumnElement, Connection, Row, bindparam, delete, insert, or_, select, update

from deltamem_tool.serve.store.contents import Contents, remove_contents
from deltamem_tool.serve.store.errors import Conflict
from deltamem_tool.serve.store.records import (
    ANY,
    ExpectedVersion,
    MemoryInfo,
    MemoryVersion,
    Quota,
    Receipt,
    VersionInfo,
)
from deltamem_tool.serve.store.schema import contents, memories, responses, versions
from deltamem_tool.serve.store.usage import check_quota, count, first_version

_INFO = (
    memories.c.id,
    versions.c.version,
    versions.c.digest,
    versions.c.size,
    memories.c.created_at,
    versions.c.created_at.label("updated_at"),
    memories.c.expires_at,
)
_VERSION = (versions.c.version, versions.c.digest, versions.c.size, versions.c.created_at)
_OF_MEMORY = (versions.c.tenant == memories.c.tenant) & (versions.c.id == memories.c.id)


def _is_current(now: float | BindParameter[float]) -> ColumnElement[bool]:
    return or_(memories.c.expires_at.is_(None), memories.c.expires_at > now)


# Statements that every turn runs are built once: building takes SQLAlchemy longer than running takes SQLite.
_MINE = (memories.c.tenant == bindparam("of_tenant"), memories.c.id == bindparam("of_id"))
_READ = (
    select(*_INFO, contents.c.content)
    .join_from(memories, versions, _OF_MEMORY)
    .join(contents, contents.c.key == versions.c.content)
    .where(*_MINE, _is_current(bindparam("now", type_=memories.c.expires_at.type)))
)
_READ_NEWEST = _READ.where(versions.c.version == memories.c.version)
_READ_VERSION = _READ.where(versions.c.version == bindparam("of_version"))
_LOCK = select(memories).where(*_MINE).with_for_update()
_ADD, _CHANGE = insert(memories), update(memories).where(*_MINE)
_ADD_VERSION = insert(versions)
_REMOVE_OUTDATED = (
    delete(versions)
    .where(versions.c.tenant == bindparam("of_tenant"), versions.c.id == bindparam("of_id"))
    .where(versions.c.version <= bindparam("last"))
    .returning(versions.c.size, versions.c.content)
)


def read_memory(
    connection: Connection, form: Contents, tenant: str, id: str, version: int | None, now: float
) -> MemoryVersion | None:
    """Return one version of a memory, the newest by default; None if there is none."""
    statement, which = _READ_NEWEST, {"of_tenant": tenant, "of_id": id, "now": now}
    if version is not None:
        statement, which = _READ_VERSION, which | {"of_version": version}
    row = connection.execute(statement, which).one_or_none()
    if row is None:
        return None
    data, turn = form.read(row.content, row.digest, "memory", tenant, id, row.version)
    info = MemoryInfo(*row[: len(_INFO)])
    return MemoryVersion(**vars(info), data=data, turn=turn)


def list_memories(
    connection: Connection, tenant: str, after: str | None, limit: int, now: float
) -> tuple[MemoryInfo, ...]:
    """Return the memories of `tenant` in the order of their ids, from the one that comes after `after`."""
    rows = (
        select(*_INFO)
        .join_from(memories, versions, _OF_MEMORY & (versions.c.version == memories.c.version))
        .where(memories.c.tenant == tenant, _is_current(now))
        .order_by(memories.c.id)
        .limit(limit)
    )
    if after is not None:
        rows = rows.where(memories.c.id > after)
    return tuple(MemoryInfo(*row) for row in connection.execute(rows))


def list_versions(connection: Connection, tenant: str, id: str, now: float) -> tuple[VersionInfo, ...]:
    """Return the stored versions of a memory, newest first; empty if there is no such memory."""
    rows = (
        select(*_VERSION)
        .join_from(memories, versions, _OF_MEMORY)
        .where(memories.c.tenant == tenant, memories.c.id == id, _is_current(now))
        .order_by(versions.c.version.desc())
    )
    return tuple(VersionInfo(*row) for row in connection.execute(rows))


def lock_memory(connection: Connection, tenant: str, id: str, now: float) -> Row[Any] | None:
    """Return the row of a memory, locked until the transaction ends. An expired memory is deleted."""
    row = connection.execute(_LOCK, {"of_tenant": tenant, "of_id": id}).one_or_none()
    if row is not None and row.expires_at is not None and row.expires_at <= now:
        remove_memory(connection, row, now)
        return None
    return row


def check_expected(row: Row[Any] | None, id: str, expected: ExpectedVersion) -> None:
    """Check that a memory has the version that its writer expects.

    Raises:
        Conflict: it has another version, exists but should not, or should exist but does not.
    """
    version = None if row is None else row.version
    if expected is ANY or version == expected:
        return
    raise Conflict(
        f"The memory {id!r} was changed in the meantime.",
        f"It {'does not exist' if version is None else f'has version {version}'}, but "
        f"{'no memory' if expected is None else f'version {expected}'} was expected.",
        "Nothing was written. Fetch it again, and repeat the request.",
    )


def write_version(
    connection: Connection,
    form: Contents,
    row: Row[Any] | None,
    *,
    tenant: str,
    id: str,
    data: bytes,
    turn: Mapping[str, Any] | None,
    expires_at: float | None,
    now: float,
    keep: int,
    quota: Quota,
) -> MemoryVersion:
    """Add a version to the memory of `row` (see `lock_memory`), or create it. Keep only the newest `keep`.

    Raises:
        QuotaExceeded: it is more than `quota`.
    """
    place = {"of_tenant": tenant, "of_id": id}
    new = {"tenant": tenant, "id": id, "created_at": now}
    if row is None:
        version, created_at = first_version(connection, tenant), now
        lifetime = {"first_version": version, "version": version, "expires_at": expires_at}
        connection.execute(_ADD, new | lifetime)
    else:
        version, created_at = row.version + 1, row.created_at
        connection.execute(_CHANGE, place | {"version": version, "expires_at": expires_at})
    entry = form.write(connection, data, turn, "memory", tenant, id, version)
    content = {"version": version, "digest": entry.digest, "size": entry.size, "content": entry.key}
    connection.execute(_ADD_VERSION, new | content)
    outdated = connection.execute(_REMOVE_OUTDATED, place | {"last": version - keep}).all()
    remove_contents(connection, [row.content for row in outdated])
    more = entry.size - sum(row.size for row in outdated)
    usage = count(connection, tenant, memories=int(row is None), size=more)
    if row is None or more > 0:
        check_quota(quota, usage)
    return MemoryVersion(id, version, entry.digest, entry.size, created_at, now, expires_at, data, turn)


def remove_memory(connection: Connection, row: Row[Any], now: float) -> Receipt:
    """Delete the memory of `row` (see `lock_memory`), and the responses that were made with it."""
    deleted_rows = connection.execute(
        delete(versions)
        .where(versions.c.tenant == row.tenant, versions.c.id == row.id)
        .returning(*_VERSION, versions.c.content)
    ).all()
    made_with = connection.execute(
        delete(responses)
        .where(responses.c.tenant == row.tenant, responses.c.memory == row.id)
        .returning(responses.c.id, responses.c.size, responses.c.content)
    ).all()
    remove_contents(connection, [each.content for each in (*deleted_rows, *made_with)])
    connection.execute(delete(memories).where(memories.c.tenant == row.tenant, memories.c.id == row.id))
    size = sum(each.size for each in (*deleted_rows, *made_with))
    count(connection, row.tenant, memories=-1, size=-size, deleted_version=row.version)
    newest_first = sorted(
        (VersionInfo(*each[: len(_VERSION)]) for each in deleted_rows), key=lambda info: -info.version
    )
    made = tuple(sorted(response.id for response in made_with))
    return Receipt(row.tenant, row.id, tuple(newest_first), made, now, erased=False)

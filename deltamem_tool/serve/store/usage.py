"""The storage used by each tenant, updated in the transaction that changes it."""

from __future__ import annotations

from functools import cache

from sqlalchemy import Connection, Executable, bindparam, case, select
from sqlalchemy.dialects import postgresql, sqlite

from deltamem_tool.serve.store.errors import QuotaExceeded
from deltamem_tool.serve.store.records import Quota, Usage
from deltamem_tool.serve.store.schema import tenants

_OF_TENANT = tenants.c.tenant == bindparam("of_tenant")
_READ = select(tenants.c.memories, tenants.c.bytes).where(_OF_TENANT)
_READ_DELETED = select(tenants.c.deleted_version).where(_OF_TENANT)


def count(connection: Connection, tenant: str, *, memories: int = 0, size: int = 0, deleted_version: int = 0) -> Usage:
    """Add to what `tenant` stores, and return the sums.

    Args:
        connection: in a transaction. Other writers of this tenant wait until it ends.
        tenant: the tenant.
        memories: number of memories to add.
        size: number of bytes to add.
        deleted_version: version of a deleted memory.
    """
    new = {"tenant": tenant, "memories": memories, "bytes": size, "deleted_version": deleted_version}
    row = connection.execute(_add(connection.dialect.name), new).one()
    return Usage(row.memories, row.bytes)


@cache
def _add(dialect: str) -> Executable:
    """The statement of `count` for a dialect."""
    new = (sqlite.insert if dialect == "sqlite" else postgresql.insert)(tenants)
    highest = case(
        (new.excluded.deleted_version > tenants.c.deleted_version, new.excluded.deleted_version),
        else_=tenants.c.deleted_version,
    )
    return new.on_conflict_do_update(
        index_elements=[tenants.c.tenant],
        set_={
            "memories": tenants.c.memories + new.excluded.memories,
            "bytes": tenants.c.bytes + new.excluded.bytes,
            "deleted_version": highest,
        },
    ).returning(tenants.c.memories, tenants.c.bytes)


def read_usage(connection: Connection, tenant: str) -> Usage:
    """Return what `tenant` stores."""
    row = connection.execute(_READ, {"of_tenant": tenant}).one_or_none()
    return Usage(0, 0) if row is None else Usage(row.memories, row.bytes)


def first_version(connection: Connection, tenant: str) -> int:
    """Return the first version of a new memory of `tenant`: higher than all that were ever deleted."""
    deleted = connection.execute(_READ_DELETED, {"of_tenant": tenant}).scalar_one_or_none()
    return (deleted or 0) + 1


def check_quota(quota: Quota, usage: Usage) -> None:
    """Check that a tenant's usage is within its quota.

    Raises:
        QuotaExceeded: the usage is more than `quota`.
    """
    for most, stored, unit in (
        (quota.memories, usage.memories, "memories"),
        (quota.bytes, usage.bytes, "bytes of memories and responses"),
    ):
        if most is not None and stored > most:
            raise QuotaExceeded(
                f"The quota for {unit} is exceeded.", f"It is {most:,}.", "Delete memories that you do not need."
            )

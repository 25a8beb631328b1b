"""Errors of a store."""

from __future__ import annotations

from deltamem_tool.errors import DeltaMemError


class StoreError(DeltaMemError):
    """A store of memories cannot do what was requested."""


class NotFound(StoreError):
    """The tenant has no such memory, version or response, or it has expired."""


class Conflict(StoreError):
    """The memory has another version than the caller expected: another writer came first. Nothing was written."""


class QuotaExceeded(StoreError):
    """The tenant would exceed its quota of memories or bytes. Nothing was written."""


class StoreUnavailable(StoreError):
    """The database cannot be reached or is locked, or its disk is full.

    Existing data is intact. The change was not made, unless the connection was lost while it was committed. A caller
    that passes the expected version finds that out from a `Conflict` when it tries again.
    """


class StoreDamaged(StoreError):
    """The database, or a row of it, is not what this store wrote, or was written with another key."""

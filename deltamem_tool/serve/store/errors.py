"""Errors of a store."""

from __future__ import annotations

from deltamem_tool.errors import DeltaMemError


class StoreError(DeltaMemError):
    """A store of memories cannot do what is asked."""


class NotFound(StoreError):
    """The tenant has no such memory, version or response, or it has expired."""


class Conflict(StoreError):
    """The memory has another version than the caller expected: somebody else was first. Nothing was written."""


class QuotaExceeded(StoreError):
    """The tenant would have more memories or bytes than it may. Nothing was written."""


class StoreUnavailable(StoreError):
    """The database cannot be reached, is locked, or its disk is full.

    What was there before is whole. The change was not made, unless the connection was lost just as it was committed:
    who says which version it replaces learns that from a `Conflict` when trying again.
    """


class StoreDamaged(StoreError):
    """The database, or a row of it, is not what this store wrote, or was written with another key."""

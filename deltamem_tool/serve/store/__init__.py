"""The memories of many users in a database: SQLite, or PostgreSQL for several servers. Imports no torch."""

from deltamem_tool.serve.store.encryption import KEY_VARIABLE
from deltamem_tool.serve.store.errors import (
    Conflict,
    NotFound,
    QuotaExceeded,
    StoreDamaged,
    StoreError,
    StoreUnavailable,
)
from deltamem_tool.serve.store.memory_store import MemoryStore
from deltamem_tool.serve.store.records import (
    ANY,
    ExpectedVersion,
    MemoryInfo,
    MemoryVersion,
    Quota,
    Receipt,
    StoredResponse,
    Usage,
    VersionInfo,
)

__all__ = [
    "ANY",
    "KEY_VARIABLE",
    "Conflict",
    "ExpectedVersion",
    "MemoryInfo",
    "MemoryStore",
    "MemoryVersion",
    "NotFound",
    "Quota",
    "QuotaExceeded",
    "Receipt",
    "StoreDamaged",
    "StoreError",
    "StoreUnavailable",
    "StoredResponse",
    "Usage",
    "VersionInfo",
]

"""Locks that run the requests for one memory sequentially, in the order of their arrival."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from deltamem_tool.serve.batching.job import QueueFull


@dataclass
class _Entry:
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    users: int = 0  # requests that hold the lock or wait for it


class MemoryLocks:
    """A lock for each memory in use.

    Args:
        max_waiting: maximum number of requests that wait for locks.
    """

    def __init__(self, max_waiting: int) -> None:
        self._max_waiting = max_waiting
        self._entries: dict[tuple[str, str], _Entry] = {}
        self.waiting = 0

    @asynccontextmanager
    async def hold(self, tenant: str, id: str) -> AsyncIterator[None]:
        """Wait for the lock of a memory, and hold it.

        Raises:
            QueueFull: too many requests are waiting.
        """
        key = tenant, id
        entry = self._entries.setdefault(key, _Entry())
        if entry.lock.locked() and self.waiting >= self._max_waiting:
            raise QueueFull(
                "Too many requests are waiting.",
                "Requests for the same memory are answered sequentially.",
                "Try again soon.",
            )
        entry.users += 1
        try:
            self.waiting += 1
            try:
                await entry.lock.acquire()
            finally:
                self.waiting -= 1
            try:
                yield
            finally:
                entry.lock.release()
        finally:
            entry.users -= 1
            if not entry.users:
                del self._entries[key]

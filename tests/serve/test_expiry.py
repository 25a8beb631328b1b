"""A server deletes expired memories from its store."""

from __future__ import annotations

import asyncio
import sqlite3
import time

from deltamem_tool.serve.expiry import expire_regularly
from deltamem_tool.serve.store import MemoryStore, StoreUnavailable

SOON = 0.01  # seconds


async def until(condition) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(SOON)


def test_expired_memories_leave_the_database(tmp_path):
    path = tmp_path / "memories.sqlite"
    store = MemoryStore(f"sqlite:///{path}")
    store.put("acme", "ada", b"1", expires_at=time.time() + 0.2)
    store.put("acme", "eve", b"1")

    def stored():
        connection = sqlite3.connect(path)
        ids = [id for (id,) in connection.execute("SELECT id FROM deltamem_memories ORDER BY id")]
        connection.close()
        return ids

    async def run():
        expiry = asyncio.create_task(expire_regularly(store, SOON))
        assert stored() == ["ada", "eve"]
        await until(lambda: stored() == ["eve"])
        expiry.cancel()

    asyncio.run(run())
    store.close()


def test_deletion_is_retried_after_a_store_error():
    class FailsOnce:
        calls = 0

        def expire(self):
            self.calls += 1
            if self.calls == 1:
                raise StoreUnavailable("The store cannot be used.", "It is locked.", "Try again.")
            return 0

    async def run():
        store = FailsOnce()
        expiry = asyncio.create_task(expire_regularly(store, SOON))
        await until(lambda: store.calls > 2)
        expiry.cancel()

    asyncio.run(run())

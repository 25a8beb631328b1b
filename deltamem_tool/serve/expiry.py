"""Delete expired memories and responses from the store while the server runs."""

from __future__ import annotations

import asyncio

from anyio.to_thread import run_sync

from deltamem_tool.serve.logs import LOGGER
from deltamem_tool.serve.store import MemoryStore, StoreError

EXPIRE_SECONDS = 60.0  # between two rounds


async def expire_regularly(store: MemoryStore, seconds: float = EXPIRE_SECONDS) -> None:
    """Delete what has expired at regular intervals, until cancelled. If the store fails, wait for the next round."""
    while True:
        try:
            while await run_sync(store.expire):  # one call deletes a limited number
                pass
        except StoreError as error:
            LOGGER.warning("expired memories could not be deleted: %s", error.what)
        await asyncio.sleep(seconds)

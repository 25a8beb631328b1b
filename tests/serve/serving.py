"""A server on uvicorn in a thread, over real HTTP."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from deltamem_tool.serve.app import build_app
from deltamem_tool.serve.batching.scheduler import Scheduler
from deltamem_tool.serve.server import bind, config_of
from deltamem_tool.serve.store import MemoryStore

MODEL = "tiny"
START_SECONDS = 20


@dataclass
class Running:
    """A running server."""

    url: str
    store: MemoryStore
    scheduler: Scheduler

    @property
    def api(self) -> str:
        return f"{self.url}/v1"


@contextmanager
def serving(engine, folder: Path, max_batch: int = 8, max_queue: int = 64, **options) -> Iterator[Running]:
    store = MemoryStore(f"sqlite:///{folder / 'memories.sqlite'}")
    scheduler = Scheduler(engine, max_batch, max_queue)
    listener = bind("127.0.0.1", 0)
    server = uvicorn.Server(config_of(build_app(MODEL, scheduler, store, **options)))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    until = time.monotonic() + START_SECONDS
    while not server.started:
        assert thread.is_alive() and time.monotonic() < until
        time.sleep(0.01)
    try:
        yield Running(f"http://127.0.0.1:{listener.getsockname()[1]}", store, scheduler)
    finally:
        server.should_exit = True
        thread.join()
        listener.close()

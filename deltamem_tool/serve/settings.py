"""The settings of a server, from which `deltamem serve` and the replicas of a Ray cluster build the application."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field
from starlette.applications import Starlette

from deltamem_tool.chat.context_window import check_window
from deltamem_tool.chat.engine import Engine
from deltamem_tool.errors import ConfigError
from deltamem_tool.serve.app import REQUEST_SECONDS, build_app
from deltamem_tool.serve.batching.scheduler import MAX_BATCH, MAX_QUEUE, Scheduler
from deltamem_tool.serve.keys import ApiKeys
from deltamem_tool.serve.store import MemoryStore, Quota
from deltamem_tool.serve.store.memory_store import KEEP_VERSIONS


class ServeSettings(BaseModel):
    """The settings of a server; the fields are the options of `deltamem serve`."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model: str
    store: str
    api_keys: Path | None = None
    no_keys: bool = False
    model_name: str | None = None
    max_batch: int = Field(default=MAX_BATCH, ge=1)
    max_queue: int = Field(default=MAX_QUEUE, ge=1)
    timeout: float = Field(default=REQUEST_SECONDS, gt=0)
    keep_versions: int = Field(default=KEEP_VERSIONS, ge=1)
    max_memories: int | None = Field(default=None, ge=1)
    max_bytes: int | None = Field(default=None, ge=1)
    window: int | None = None

    def keys(self) -> ApiKeys | None:
        """Return the keys in the key file; None if there is no key file.

        Raises:
            ConfigError: the file is missing or invalid.
        """
        return None if self.api_keys is None else ApiKeys.read(self.api_keys)

    def app(self, engine: Engine, keys: ApiKeys | None) -> Starlette:
        """Return the application, which closes its store and its scheduler when it shuts down.

        Args:
            engine: the model.
            keys: accepted API keys; None accepts every request.

        Raises:
            ConfigError: the model has no chat template, the window is too small or too large for it, or the store's
                URL is invalid.
            StoreError: the store cannot be used.
        """
        if not engine.text.has_template:
            raise ConfigError(
                f"{self.model} cannot be served.",
                "It has no chat template.",
                "Serve the adapter of a chat or instruct model.",
            )
        check_window(engine, self.window)
        quota = Quota(self.max_memories, self.max_bytes)
        store = MemoryStore(self.store, keep_versions=self.keep_versions, quota=quota)
        scheduler = Scheduler(engine, self.max_batch, self.max_queue)
        return build_app(
            self.model_name or self.model,
            scheduler,
            store,
            keys,
            self.window,
            self.timeout,
            self.max_queue,
            own_pages_only=keys is None and not self.no_keys,
        )

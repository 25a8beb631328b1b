"""A cache of computed prompts, for later prompts with the same prefix."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from deltamem_tool.chat.engine import Engine, Past
from deltamem_tool.memory.file import StoredMemory
from deltamem_tool.serve.batching.job import Job

Key = bytes  # hash of a prefix of whole pieces: its prefix key, the initial memory, the tokens, and which of them write


def prefix_keys(job: Job, piece: int) -> list[Key]:
    """Return the keys of the prefixes of one piece, two pieces, …, that leave a token to feed.

    Without a prefix key, there are none.
    """
    if job.prefix_key is None or len(job.tokens) <= piece:
        return []
    chain = hashlib.sha256(f"{job.memory.digest()} {job.prefix_key}".encode())
    tokens = np.array(job.tokens, np.int64)
    keys = []
    for start in range(0, len(tokens) - piece, piece):
        chain.update(tokens[start : start + piece].tobytes())
        keys.append(chain.digest())
    return keys


@dataclass(frozen=True)
class Prefix:
    """A computed prefix of a prompt.

    Args:
        keys: keys of its own prefixes, one per piece; the last one is that of the whole.
        past: past after the whole prefix, of one row.
        memories: memory after each piece.
        tenant: tenant that it belongs to.
        names: see `Job`.
    """

    keys: Sequence[Key]
    past: Past
    memories: Sequence[StoredMemory]
    tenant: str = ""
    names: frozenset[str] = frozenset()


class PrefixCache:
    """A cache of prefixes that evicts the least recently used ones first. Not thread-safe.

    Args:
        engine: engine of the pasts.
        piece: tokens per piece.
        room: size in bytes; 0 keeps nothing.
    """

    def __init__(self, engine: Engine, piece: int, room: int) -> None:
        self._engine, self._piece, self._room = engine, piece, room
        self._prefixes: OrderedDict[Key, Prefix] = OrderedDict()  # by the key of the whole prefix
        self._sizes: dict[Key, int] = {}
        self._owners: dict[Key, Key] = {}  # key of the prefix that contains each shorter prefix

    def longest(self, keys: Sequence[Key]) -> Prefix | None:
        """Return the longest prefix in the cache."""
        for count in range(len(keys), 0, -1):
            owner = self._owners.get(keys[count - 1])
            if owner is not None:
                self._prefixes.move_to_end(owner)
                return self._truncate(self._prefixes[owner], count)
        return None

    def _truncate(self, prefix: Prefix, count: int) -> Prefix:
        if count == len(prefix.keys):
            return prefix
        past = self._engine.take(prefix.past, 0, np.arange(count * self._piece))
        past = self._engine.with_memory(past, prefix.memories[count - 1])
        return Prefix(prefix.keys[:count], past, prefix.memories[:count])

    def put(self, prefix: Prefix) -> None:
        """Add a prefix, if it can fit, in place of its own prefixes."""
        size = self._engine.size(prefix.past)
        if size > self._room:
            return
        *shorter, whole = prefix.keys
        for key in (*(shorter if self._engine.takes_back else ()), whole):
            self._drop(key)
            self._owners[key] = whole
        self._prefixes[whole], self._sizes[whole] = prefix, size
        while self.size > self._room:
            self._drop(next(iter(self._prefixes)))

    def forget(self, tenant: str, name: str) -> None:
        """Drop the prefixes of a tenant's jobs that have this name."""
        for whole, prefix in list(self._prefixes.items()):
            if prefix.tenant == tenant and name in prefix.names:
                self._drop(whole)

    @property
    def size(self) -> int:
        """Total size in bytes."""
        return sum(self._sizes.values())

    def _drop(self, whole: Key) -> None:
        prefix = self._prefixes.pop(whole, None)
        if prefix is None:
            return
        del self._sizes[whole]
        for key in prefix.keys:
            if self._owners.get(key) == whole:
                del self._owners[key]

"""A separate process that counts in a memory, and prints each acknowledged count: `writer.py URL TIMES`."""

from __future__ import annotations

import sys

from deltamem_tool.serve.store import Conflict, MemoryStore

TENANT, NAME = "acme", "ada"
FACTOR = 4000  # as long as a state, starting with the count


def data_of(number: int) -> bytes:
    return b"%d " % number * FACTOR


def number_of(data: bytes) -> int:
    number = int(data.split()[0])
    assert data == data_of(number)
    return number


def count_once(store: MemoryStore) -> int:
    """Increment the count in the memory, with a retry if another writer was first. Returns the version."""
    while True:
        stored = store.get(TENANT, NAME)
        number, version = (0, None) if stored is None else (number_of(stored.data), stored.version)
        try:
            return store.put(TENANT, NAME, data_of(number + 1), version).version
        except Conflict:
            continue


if __name__ == "__main__":
    store = MemoryStore(sys.argv[1])
    for _ in range(int(sys.argv[2])):
        print(count_once(store), flush=True)
    store.close()

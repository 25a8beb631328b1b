"""Operations on the memories of several conversations: select or average rows, and permute layers."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from deltamem_tool.memory.file import MemoryShape, StoredMemory


def take_rows(memory: StoredMemory, rows: Sequence[int]) -> StoredMemory:
    """Copy the memory of some conversations, in the order of `rows`."""
    index = np.asarray(rows, np.int64)
    return _map_states(memory, lambda array: array[index])


def join_rows(memories: Sequence[StoredMemory]) -> StoredMemory:
    """Concatenate all conversations of several memories of one adapter, in order."""
    states, segments = (
        {layer: np.concatenate([part[layer] for part in parts]) for layer in parts[0]}
        for parts in ([memory.states for memory in memories], [memory.open_segments for memory in memories])
    )
    return StoredMemory(states, segments, memories[0].adapter)


def mean_rows(memory: StoredMemory, rows: Sequence[Sequence[int]]) -> StoredMemory:
    """Average the memories of several conversations. Each entry of `rows` lists those of one row of the result."""
    # One by one: of large states, all that are averaged would not fit at once.
    return _map_states(
        memory, lambda array: np.stack([array[list(row)].mean(0, dtype=np.float64) for row in rows]).astype(np.float32)
    )


def has_layers_to_permute(shape: MemoryShape) -> bool:
    """Return whether a memory has several layers, with states of equal shape."""
    return len(shape.layers) > 1 and len(set(shape.layers.values())) == 1


def permute_layers(memory: StoredMemory, seed: int) -> StoredMemory:
    """Give every layer the state of another one: a cycle of all layers, drawn with `seed`."""
    layers = sorted(memory.states)
    cycle = random.Random(seed).sample(layers, len(layers))
    source = dict(zip(cycle, [*cycle[1:], cycle[0]], strict=True))
    return replace(memory, states={layer: memory.states[source[layer]] for layer in layers})


def _map_states(memory: StoredMemory, change: Callable[[NDArray[np.float32]], NDArray[np.float32]]) -> StoredMemory:
    states, segments = (
        {layer: change(array) for layer, array in part.items()} for part in (memory.states, memory.open_segments)
    )
    return StoredMemory(states, segments, memory.adapter)

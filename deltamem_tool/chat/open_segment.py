"""A memory file's open segment, written: what `memory.end_segment` does in PyTorch, for one moment and in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltamem_tool.config import L2_EPS, DeltaMemConfig
from deltamem_tool.memory.file import StoredMemory


def end_segment(config: DeltaMemConfig, memory: StoredMemory) -> StoredMemory:
    """Write what open segments have gathered, and begin anew. A row whose segment is empty stays as it is."""
    states = {
        layer: _written(config, state, memory.open_segments[layer]) if memory.open_segments else state
        for layer, state in memory.states.items()
    }
    empty = {layer: np.zeros_like(segment) for layer, segment in memory.open_segments.items()}
    return StoredMemory(states, empty, memory.adapter)


def _written(config: DeltaMemConfig, state: NDArray[Any], segment: NDArray[Any]) -> NDArray[Any]:
    """State `[B, H, R, R]` after one write of the means in the segment `[B, W]`, with `memory.layer.gates`:
    S ← keep S − erase (S k) kᵀ + write v kᵀ."""
    tokens = segment[:, -1:]
    means = segment[:, :-1] / np.maximum(tokens, 1)
    rows, gates = config.state_heads * config.rank, config.gate_width
    key, value, beta, *decay = np.split(
        means, [rows, 2 * rows, 2 * rows + gates][: 2 if config.couple_lambda else 3], 1
    )
    shape = (len(state), config.state_heads, -1)
    k = np.tanh(key.reshape(shape))
    k = k / np.maximum(np.linalg.norm(k, axis=-1, keepdims=True), L2_EPS)  # [B, H, R]
    write = _sigmoid(beta.reshape(shape))  # [B, H, R], or [B, H, 1] for one gate a head
    decayed = _sigmoid(decay[0].reshape(shape) if decay else -beta.reshape(shape))  # λ
    keep = np.ones_like(write) if config.update_rule == "no_lambda" else decayed
    erase = write * decayed if config.update_rule == "lambda_outside" else write
    predicted = np.einsum("bhij,bhj->bhi", state, k)
    change = write * value.reshape(shape) - erase * predicted
    written = keep[..., None] * state + change[..., None] * k[..., None, :]
    return np.where((tokens > 0)[:, :, None, None], written, state).astype(np.float32)


def _sigmoid(x: NDArray[Any]) -> NDArray[Any]:
    return 0.5 * (1 + np.tanh(0.5 * x))  # exp(-x) would overflow

"""Write an open segment in NumPy, for engines that run without PyTorch."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltamem_tool.config import L2_EPS, DeltaMemConfig


def write_segment(config: DeltaMemConfig, state: NDArray[Any], open_segment: NDArray[Any]) -> NDArray[Any]:
    """Write the means of an open segment, as `memory.layer.end_segment` does.

    Args:
        config: options of the mechanism.
        state: float32 `[B, H, R, R]`.
        open_segment: float32 `[B, W]`; a row without tokens writes nothing.

    Returns:
        The state after the write, S ← keep S − erase (S k) kᵀ + write v kᵀ.
    """
    tokens = open_segment[:, -1:]
    means = open_segment[:, :-1] / np.maximum(tokens, 1)
    rows, gates = config.state_heads * config.rank, config.gate_width
    bounds = [rows, 2 * rows] if config.couple_lambda else [rows, 2 * rows, 2 * rows + gates]
    parts = (part.reshape(len(state), config.state_heads, -1) for part in np.split(means, bounds, axis=1))
    key, value, beta, *decay = parts  # [B, H, R] each; gates may be [B, H, 1]
    k = np.tanh(key)
    k = k / np.maximum(np.linalg.norm(k, axis=-1, keepdims=True), L2_EPS)
    write = _sigmoid(beta)
    decayed = _sigmoid(decay[0] if decay else -beta)  # λ
    keep = np.ones_like(write) if config.update_rule == "no_lambda" else decayed
    erase = write * decayed if config.update_rule == "lambda_outside" else write
    change = write * value - erase * np.einsum("bhij,bhj->bhi", state, k)
    written = keep[..., None] * state + change[..., None] * k[..., None, :]
    return np.where((tokens > 0)[:, :, None, None], written, state).astype(np.float32)


def _sigmoid(x: NDArray[Any]) -> NDArray[Any]:
    return 0.5 * (1 + np.tanh(0.5 * x))  # exp(-x) would overflow

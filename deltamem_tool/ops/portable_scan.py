"""The recurrence in standard ONNX operators, for tracing alone: a `Scan` over tokens, whose body is the equation.

torch's own loop operator becomes that `Scan`. Both loops here carry what a conversation carries from call to call, so
nothing that grows with a call's length can be lost to rounding, and no gate value is divided by.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deltamem_tool._compat import scan


def portable_scan(
    q: Tensor, k: Tensor, v: Tensor, log_keep: Tensor, erase: Tensor, write: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Arguments and results of `delta_scan`, float32.

    q, k, v, log_keep, erase, write: `[B, T, H, R]`; state: `[B, H, R, R]`.
    Returns reads `[B, T, H, R]` and the state after the last token `[B, H, R, R]`.
    """
    # A loop step of a row is a column: [T, B, H, R, 1]. What needs no state is computed outside of the loop.
    columns = [x.transpose(0, 1).unsqueeze(-1) for x in (q, k, log_keep.exp(), erase, write * v)]
    state, reads = scan(_step, state, columns)
    return reads.squeeze(-1).transpose(0, 1), state


def _step(state: Tensor, token: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Process one token: return the state `[B, H, R, R]` after it, and its reading `[B, H, R, 1]` of the one before."""
    q, k, keep, erase, written = token
    change = written - erase * torch.matmul(state, k)
    return keep * state + change * k.transpose(-1, -2), torch.matmul(state, q)


def portable_linear_attention(
    rule: str,
    heads: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: Tensor,
    decay: Tensor,
    beta: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Arguments and results of `onnx_scan.linear_attention`, of its rules "gated" and "gated_delta"."""
    batch, tokens = query.shape[:2]
    states, rank, width = state.shape[1:]
    # A loop step's are columns: [T, B, heads, R, 1], and [T, B, N, ·, 1].
    query, key = (x.view(batch, tokens, heads, rank, 1).repeat_interleave(states // heads, dim=2) for x in (query, key))
    value = value.view(batch, tokens, states, width, 1)
    keep = decay.exp().view(batch, tokens, states, -1, 1)
    written = [] if beta is None else [beta.view(batch, tokens, states, 1, 1)]
    state, reads = scan(
        _attend if beta is None else _attend_by_delta,
        state,
        [x.transpose(0, 1) for x in (query, key, value, keep, *written)],
    )
    return reads.transpose(0, 1).reshape(batch, tokens, states * width), state


def _attend(state: Tensor, token: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Process one token: return the state `[B, N, R, V]` after it, and the reading `[B, N, V, 1]` of that state."""
    query, key, value, keep = token
    state = keep * state + key * value.transpose(-1, -2)
    return state, torch.matmul(state.transpose(-1, -2), query)


def _attend_by_delta(state: Tensor, token: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Do the same with the delta rule, which subtracts the value that the state already has for the key."""
    query, key, value, keep, beta = token
    state = keep * state
    change = beta * (value - torch.matmul(state.transpose(-1, -2), key))
    state = state + key * change.transpose(-1, -2)
    return state, torch.matmul(state.transpose(-1, -2), query)


def portable_sums(x: Tensor, segment_end: Tensor | None, carried: Tensor) -> tuple[Tensor, Tensor]:
    """Arguments and results of `segment_sums`, float32.

    x: `[B, T, W]`; segment_end: bool `[B, T]`; carried: `[B, W]`.
    Returns the sums `[B, T, W]`, and those of the segment that is open after the last token `[B, W]`.
    """
    if segment_end is None:
        segment_end = torch.zeros_like(x[..., 0], dtype=torch.bool)
    goes_on = (~segment_end).to(x.dtype).transpose(0, 1).unsqueeze(-1)  # [T, B, 1]
    opened, sums = scan(_add, carried, [x.transpose(0, 1), goes_on])
    return sums.transpose(0, 1), opened


def _add(opened: Tensor, token: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Process one token: return the open sums `[B, W]` after it, and the sums including it `[B, W]`."""
    x, goes_on = token
    total = opened + x
    return total * goes_on, total

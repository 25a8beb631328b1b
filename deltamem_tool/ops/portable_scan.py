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
    """One token: the state `[B, H, R, R]` after it, and its reading `[B, H, R, 1]` of the state before it."""
    q, k, keep, erase, written = token
    change = written - erase * torch.matmul(state, k)
    return keep * state + change * k.transpose(-1, -2), torch.matmul(state, q)


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
    """One token: what is open `[B, W]` after it, and the sum up to and with it `[B, W]`."""
    x, goes_on = token
    total = opened + x
    return total * goes_on, total

"""The recurrence as one ONNX Runtime operator, for tracing alone: `com.microsoft::LinearAttention`.

The operator's `gated_delta` rule is `S ← e^g S + β k (u − e^g Sᵀk)ᵀ`, and it reads after it writes. So one operator
head is one row of our state, with `g = log keep`, `β = erase / keep` and `u = v · keep · write / erase`; and it gets
one step more than there are tokens: keys, values and gates a step late, so that token t is read before it is written.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# Below e^-60 what a row keeps is nothing beside what is written, in float32; dividing by it must not overflow.
MIN_LOG_KEEP = -60.0
MIN_ERASE = math.exp(MIN_LOG_KEEP)
LOG_NOTHING = -1e4  # its exponential is 0


def linear_attention_scan(
    q: Tensor, k: Tensor, v: Tensor, log_keep: Tensor, erase: Tensor, write: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Arguments and results of `delta_scan`, float32; outside of an ONNX export the numbers that return mean nothing.

    q, k, v, log_keep, erase, write: `[B, T, H, R]`; state: `[B, H, R, R]`.
    Returns reads `[B, T, H, R]` and the state after the last token `[B, H, R, R]`.
    """
    batch, tokens, heads, rank = q.shape
    log_keep = log_keep.clamp_min(MIN_LOG_KEEP)
    # The operator writes through β alone: a row that is written and not erased is erased by next to nothing.
    erase = torch.where(write > 0, erase.clamp_min(MIN_ERASE), erase)
    keep = log_keep.exp()
    beta = erase / keep
    value = v * (keep * (write / erase.clamp_min(MIN_ERASE)))
    # Step 0 has zero gates: it reads the state as it came. The last step only writes.
    key, value, decay, beta = (_pack(F.pad(x, (0, 0, 0, 0, 1, 0))) for x in (k, value, log_keep, beta))
    query = _pack(F.pad(q, (0, 0, 0, 0, 0, 1)))
    rows = heads * rank
    carried = state.reshape(batch, rows, rank, 1)
    reads, state = linear_attention("gated_delta", heads, query, key, value, carried, decay, beta)
    return reads[:, :tokens].reshape(batch, tokens, heads, rank), state.reshape(batch, heads, rank, rank)


def linear_attention_sums(x: Tensor, segment_end: Tensor | None, carried: Tensor) -> tuple[Tensor, Tensor]:
    """Arguments and results of `segment_sums`, float32, by the same operator's `gated` rule.

    It is `S ← e^g S + k uᵀ`, with k = 1: the sums are kept (g = 0) or, after a segment's last token, dropped.

    x: `[B, T, W]`; segment_end: bool `[B, T]`; carried: `[B, W]`.
    Returns the sums `[B, T, W]`, and those of the segment that is open after the last token `[B, W]`.
    """
    width = x.shape[-1]
    one = torch.ones_like(x[..., :1])
    if segment_end is None:
        segment_end = torch.zeros_like(one[..., 0], dtype=torch.bool)
    ended = F.pad(segment_end[:, :-1].unsqueeze(-1).to(x.dtype), (0, 0, 1, 0))  # the token before was a last one
    sums, opened = linear_attention("gated", 1, one, one, x, carried.reshape(-1, 1, 1, width), ended * LOG_NOTHING)
    return sums, opened.reshape(-1, width) * (~segment_end[:, -1:]).to(x.dtype)


def linear_attention(
    rule: str,
    heads: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: Tensor,
    decay: Tensor | None,
    beta: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Trace ONNX Runtime's operator.

    Args:
        rule: its `update_rule`.
        heads: of query and key.
        query: `[B, T, heads·R]`, as the key is.
        key: of each step.
        value: `[B, T, N·V]`; N is the number of states.
        state: `[B, N, R, V]`.
        decay: logarithm of what is kept.
        beta: the gate of the delta rules.

    Returns:
        The readings `[B, T, N·V]` and the state after the last step.
    """
    reads, state = torch.onnx.ops.symbolic_multi_out(
        "com.microsoft::LinearAttention",
        [query, key, value, state, decay, *([] if beta is None else [beta])],
        attrs={"q_num_heads": heads, "kv_num_heads": state.shape[1], "update_rule": rule, "scale": 1.0},
        dtypes=[torch.float32, torch.float32],
        shapes=[list(value.shape), list(state.shape)],
        version=1,
    )
    return reads, state


def _pack(x: Tensor) -> Tensor:
    """Reshape `[B, T, H, R]` to `[B, T, H·R]`."""
    return x.flatten(2)

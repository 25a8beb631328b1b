"""The recurrence token by token, with an explicit gradient: the least work for many rows and few tokens.

The adjoint G_t = dL/dS_t follows the same kind of recurrence, backwards (see README.md in this folder):

    G_{t-1} = keep_t ⊙ G_t − (erase_t ⊙ G_t k_t) k_tᵀ + (dL/dr_t) q_tᵀ

So two short loops compute the states and the adjoints, and everything else is batched over tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def recurrent_scan(
    q: Tensor, k: Tensor, v: Tensor, log_keep: Tensor, erase: Tensor, write: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the same as `naive.naive_scan`. Keeps T states `[B, H, R, R]` for the backward pass."""
    if q.shape[1] == 1:
        return _one_token(q, k, v, log_keep, erase, write, state)
    inputs = (q, k, v, log_keep, erase, write, state)
    results: tuple[Tensor, Tensor] = _RecurrentScan.apply(*inputs)  # type: ignore[no-untyped-call]  # of torch
    return results


def _one_token(
    q: Tensor, k: Tensor, v: Tensor, log_keep: Tensor, erase: Tensor, write: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    q_k = torch.cat((q, k), dim=1).permute(0, 2, 3, 1)
    v, keep, erase, write = (x.permute(0, 2, 3, 1) for x in (v, log_keep.exp(), erase, write))
    reading, state = delta_step(q_k, v, keep, erase, write, state)
    return reading.permute(0, 3, 1, 2), state


def delta_step(
    q_k: Tensor, v: Tensor, keep: Tensor, erase: Tensor, write: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Read and write for one token, in as few operations as possible, since these cost more than the arithmetic.

    Args:
        q_k: query and key as columns, `[B, H, R, 2]`.
        v: `[B, H, R, 1]`.
        keep: `[B, H, R, 1]`, or `[B, H, 1, 1]` for one gate per head, like erase and write; not its logarithm.
        erase: gate on the value found by the key.
        write: gate on v.
        state: `[B, H, R, R]`.

    Returns:
        The reading `[B, H, R, 1]` and the state after the token.
    """
    reading, predicted = torch.split(torch.matmul(state, q_k), 1, dim=-1)
    change = torch.addcmul(write * v, erase, predicted, value=-1)  # d_t
    return reading, torch.addcmul(state * keep, change, q_k[..., 1:].mT)


class _RecurrentScan(torch.autograd.Function):
    # Inside, tokens lead: [T, N, R] and [T, N, R, R] with N = B·H, so that a token's slice is contiguous.

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, log_keep: Tensor, erase: Tensor, write: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        heads = q.shape[2]
        q, k, v, keep, erase, write = (_tokens_first(x) for x in (q, k, v, log_keep.exp(), erase, write))
        states = state.new_empty((*q.shape, q.shape[-1]))  # S_{t-1}, [T, N, R, R]
        now = state.flatten(0, 1)
        steps = zip(k, write * v, erase, keep, strict=True)
        for t, (k_t, written, erased, kept) in enumerate(steps):
            states[t] = now
            predicted = torch.bmm(now, k_t.unsqueeze(-1)).squeeze(-1)
            change = torch.addcmul(written, erased, predicted, value=-1)  # d_t
            now = torch.addcmul(now * kept.unsqueeze(-1), change.unsqueeze(-1), k_t.unsqueeze(-2))
        ctx.save_for_backward(q, k, v, keep, erase, write, states)
        ctx.heads = heads
        return _batch_first(_times(states, q), heads), now.view(state.shape)

    @staticmethod
    def backward(ctx: Any, grad_reads: Tensor, grad_state: Tensor) -> tuple[Tensor, ...]:
        q, k, v, keep, erase, write, states = ctx.saved_tensors
        grad_reads = _tokens_first(grad_reads)
        adjoints = torch.empty_like(states)  # G_t
        now = grad_state.flatten(0, 1)
        for t in range(len(k) - 1, -1, -1):
            adjoints[t] = now
            k_t = k[t].unsqueeze(-1)
            erased = erase[t].unsqueeze(-1) * torch.bmm(now, k_t)
            now = torch.addcmul(now * keep[t].unsqueeze(-1), erased, k_t.mT, value=-1)
            now = torch.addcmul(now, grad_reads[t].unsqueeze(-1), q[t].unsqueeze(-2))
        predicted = _times(states, k)  # S_{t-1} k_t
        grad_change = _times(adjoints, k)  # G_t k_t
        grad_q = _transposed_times(states, grad_reads)
        grad_k = _transposed_times(adjoints, write * v - erase * predicted)
        grad_k -= _transposed_times(states, erase * grad_change)
        grad_log_keep = keep * (adjoints * states).sum(-1)
        grads = (grad_q, grad_k, write * grad_change, grad_log_keep, -predicted * grad_change, v * grad_change)
        return *(_batch_first(grad, ctx.heads) for grad in grads), now.view(grad_state.shape)


def _tokens_first(x: Tensor) -> Tensor:
    """[B, T, H, R] -> [T, N, R]."""
    return x.transpose(0, 1).flatten(1, 2).contiguous()


def _batch_first(x: Tensor, heads: int) -> Tensor:
    """[T, N, R] -> [B, T, H, R]."""
    return torch.unflatten(x, 1, (-1, heads)).transpose(0, 1)


def _times(matrices: Tensor, x: Tensor) -> Tensor:
    """M x: [T, N, R, R] and [T, N, R] -> [T, N, R]."""
    return torch.bmm(matrices.flatten(0, 1), x.reshape(-1, x.shape[-1], 1)).view(x.shape)


def _transposed_times(matrices: Tensor, x: Tensor) -> Tensor:
    """Mᵀ x, as the row xᵀ M."""
    return torch.bmm(x.reshape(-1, 1, x.shape[-1]), matrices.flatten(0, 1)).view(x.shape)

"""The recurrence token by token, as a direct transcription of the equation. `gates.gates` computes the gates."""

import torch
from torch import Tensor


def naive_scan(
    q: Tensor, k: Tensor, v: Tensor, log_keep: Tensor, erase: Tensor, write: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Read, then write, token by token (arXiv 2605.12357; see README.md in this folder).

    Every tensor has one dtype. q, k, v, log_keep, erase, write: [B, T, H, R]; state: [B, H, R, R].
    Returns reads [B, T, H, R] and the state after the last token [B, H, R, R].

    This is the reference that the other implementations are tested against. It is slow, since it takes T small steps.
    """
    keep = log_keep.exp()
    reads = []
    # unbind, not indexing: the gradient of x[:, t] is as large as x, which would make the backward pass quadratic in T.
    tokens = zip(*(x.unbind(1) for x in (q, k, v, keep, erase, write)), strict=True)
    for q_t, k_t, v_t, keep_t, erase_t, write_t in tokens:
        reads.append(_apply(state, q_t))  # r_t = S_{t-1} q_t
        predicted = _apply(state, k_t)  # p_t = S_{t-1} k_t
        change = write_t * v_t - erase_t * predicted  # d_t, one number per row
        state = keep_t.unsqueeze(-1) * state + change.unsqueeze(-1) * k_t.unsqueeze(-2)
    return (torch.stack(reads, dim=1) if reads else torch.empty_like(q)), state


def _apply(state: Tensor, x: Tensor) -> Tensor:
    """[B, H, R, R] times [B, H, R] -> [B, H, R]."""
    return (state @ x.unsqueeze(-1)).squeeze(-1)

"""Running sums that begin anew after every segment: what a segment has gathered up to each of its tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cumulative_sums(x: Tensor, last: Tensor | None, carried: Tensor) -> tuple[Tensor, Tensor]:
    """Add up `x` from the beginning of each token's segment to that token.

    Args:
        x: `[B, T, W]`, zero for tokens that belong to no segment.
        last: bool `[B, T]`, tokens that end a segment; None for none.
        carried: `[B, W]`, what the segment that is open at the first token has gathered before this call.

    Returns:
        The sums up to and with each token `[B, T, W]`, and what the segment that is open after the last token has
        gathered `[B, W]`; both in the dtype of `x`. One call or many: the sums are the same.
    """
    if x.shape[1] == 0:
        return x, carried
    # Sums over the whole call grow with its length, and a segment's is a difference of two: float64 keeps it exact.
    total = x.double().cumsum(1)
    if last is None:
        sums = (total + carried.double().unsqueeze(1)).to(x.dtype)
        return sums, sums[:, -1]
    # How many tokens of the call had gone by at the end of the last segment before each token, [B, T]: 0 for none.
    position = torch.arange(1, x.shape[1] + 1, device=x.device)
    ended = F.pad((position * last)[:, :-1], (1, 0)).cummax(1).values
    starts = torch.cat([-carried.double().unsqueeze(1), total], dim=1)
    sums = (total - starts.gather(1, ended.unsqueeze(-1).expand_as(x))).to(x.dtype)
    return sums, sums[:, -1].masked_fill(last[:, -1:], 0.0)

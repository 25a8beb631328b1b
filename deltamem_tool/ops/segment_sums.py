"""Running sums that restart after every segment, and the means of the segments.

W · mean(x) equals mean(W · x), so a segment needs only the sums of its pre-activations and a count.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from deltamem_tool.ops.onnx_scan import linear_attention_sums
from deltamem_tool.ops.portable_scan import portable_sums
from deltamem_tool.ops.scan import default_implementation

_FOR_TRACING = {"onnx": linear_attention_sums, "portable": portable_sums}


def segment_sums(x: Tensor, segment_end: Tensor | None, carried: Tensor) -> tuple[Tensor, Tensor]:
    """Sum `x` from the beginning of each token's segment up to that token.

    In an ONNX export, operators of the graph's runtime compute the sums.

    Args:
        x: `[B, T, W]`, zero for tokens that belong to no segment.
        segment_end: bool `[B, T]`, tokens that end a segment; None for none.
        carried: `[B, W]`, the sums of the segment that is open before the first token, from earlier calls.

    Returns:
        The sums up to and including each token `[B, T, W]`, and those of the segment that is open after the last token
        `[B, W]`, both in the dtype of `x`. They are the same in one call or in many.
    """
    return _FOR_TRACING.get(default_implementation() or "", cumulative_sums)(x, segment_end, carried)


def cumulative_sums(x: Tensor, segment_end: Tensor | None, carried: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `segment_sums` in PyTorch."""
    if x.shape[1] == 0:
        return x, carried
    # Sums over the whole call grow with its length, and a segment's is a difference of two: float64 keeps it exact.
    total = x.double().cumsum(1)
    if segment_end is None:
        sums = (total + carried.double().unsqueeze(1)).to(x.dtype)
        return sums, sums[:, -1]
    # How many tokens of the call had gone by at the end of the last segment before each token, [B, T]: 0 for none.
    position = torch.arange(1, x.shape[1] + 1, device=x.device)
    ended = F.pad((position * segment_end)[:, :-1], (1, 0)).cummax(1).values
    starts = torch.cat([-carried.double().unsqueeze(1), total], dim=1)
    sums = (total - starts.gather(1, ended.unsqueeze(-1).expand_as(x))).to(x.dtype)
    return sums, sums[:, -1].masked_fill(segment_end[:, -1:], 0.0)


def segment_terms(parts: Sequence[Tensor]) -> Tensor:
    """Return what each token adds to its segment, `[B, T, W]`: its pre-activations, and a one that counts it."""
    return torch.cat([*parts, torch.ones_like(parts[0][..., :1])], dim=-1)


def segment_means(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Return the means `[..., W - 1]` and the number of tokens `[..., 1]` from sums `[..., W]`."""
    tokens = sums[..., -1:]
    return sums[..., :-1] / tokens.clamp_min(1.0), tokens

"""The memory of one attention layer: hidden states and a state in, readings and the next state out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltamem_tool.config import DeltaMemConfig
from deltamem_tool.ops import delta_scan

L2_EPS = 1e-6
BASE_SLICE_WIDTH = 8  # how many columns of Δ `base_slice` fills at most
BASE_SLICE_NORM = 0.05  # and the length of each


class DeltaMemory(nn.Module):
    """One layer's projections, gates and corrections (arXiv 2605.12357, sections 3.1 to 3.3). Always float32.

    Shapes: hidden states `[B, T, D]`, state `[B, H, R, R]` indexed [value row, key column], readings `[B, T, H·R]`.

    Args:
        config: the mechanism.
        hidden_size: D.
        out_features: output width of each corrected projection, by branch.
    """

    def __init__(self, config: DeltaMemConfig, hidden_size: int, out_features: Mapping[str, int]) -> None:
        super().__init__()
        self.config = config
        width = config.state_heads * config.rank

        def linear(wide: int, out: int, bias: bool = False) -> nn.Linear:
            return nn.Linear(wide, out, bias=bias, dtype=torch.float32)

        self.query = linear(hidden_size, width)
        self.key = linear(hidden_size, width)
        self.value = linear(hidden_size, width)
        self.gate = linear(hidden_size, width, bias=True)  # β's pre-activation, one per state row
        self.delta = nn.ModuleDict({branch: linear(width, out_features[branch]) for branch in config.heads})
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for projection in (self.query, self.key, self.value):
            nn.init.kaiming_uniform_(projection.weight, a=math.sqrt(5))
        nn.init.zeros_(self.gate.weight)
        nn.init.constant_(self.gate.bias, self.config.beta_bias)
        for branch in self.config.heads:
            nn.init.zeros_(self.delta_of(branch).weight)

    def delta_of(self, branch: str) -> nn.Linear:
        """Δ of one branch, `[out, H·R]`."""
        return cast(nn.Linear, self.delta[branch])

    @torch.no_grad()
    def start_from_base(self, columns: Mapping[str, Tensor]) -> None:
        """Fill the first columns of each Δ with the first columns of its branch's base weight, `[out, n]` by branch,
        each scaled to a fixed length (`base_slice_fixed` of the reference)."""
        for branch, weight in columns.items():
            delta = self.delta_of(branch).weight
            count = min(BASE_SLICE_WIDTH, self.config.rank, weight.shape[1])
            start = weight[:, :count].to(delta)
            delta[:, :count] = start / start.norm(dim=0, keepdim=True).clamp_min(L2_EPS) * BASE_SLICE_NORM

    def gates(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(log keep, erase, write) from the gate's pre-activation z `[..., R]`, with β = sigmoid(z), λ = 1 − β.

        | rule             | keep | erase | write |
        | standard (paper) | λ    | β     | β     |
        | lambda_outside   | λ    | λβ    | β     |
        | no_lambda        | 1    | β     | β     |
        """
        beta = torch.sigmoid(z)
        log_keep = torch.zeros_like(z) if self.config.update_rule == "no_lambda" else -F.softplus(z)
        erase = beta * torch.sigmoid(-z) if self.config.update_rule == "lambda_outside" else beta
        return log_keep, erase, beta

    def forward(
        self, hidden: Tensor, state: Tensor, reads: Tensor | None, writes: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Read for every token from the state before it, then write.

        Args:
            hidden: `[B, T, D]`, what enters self-attention.
            state: `[B, H, R, R]` before the first token.
            reads: bool `[B, T]`, tokens that read (others get zeros); None for all.
            writes: bool `[B, T]`, tokens that write; None for none, which leaves the state as it is.

        Returns:
            Readings `[B, T, H·R]` and the state `[B, H, R, R]` after the last token.
        """
        batch, tokens, _ = hidden.shape
        heads = (batch, tokens, self.config.state_heads, self.config.rank)
        x = hidden.to(self.query.weight.dtype)
        if reads is not None:
            # A padding token's numbers can be inf or NaN, which no mask takes out of a product.
            x = x.masked_fill(~(reads if writes is None else reads | writes)[:, :, None], 0.0)
        with _full_precision(x):
            q = _normalised(self.query(x).view(heads))
            if writes is None:
                readings = torch.einsum("bhij,bthj->bthi", state, q)
            else:
                k = _normalised(self.key(x).view(heads))
                v = self.value(x).view(heads)
                log_keep, erase, write = self.gates(self.gate(x).view(heads))
                here = writes[:, :, None, None].to(x.dtype)
                readings, state = delta_scan(q, k, v, log_keep * here, erase * here, write * here, state)
        if reads is not None:
            readings = readings * reads[:, :, None, None].to(x.dtype)
        return readings.flatten(2), state

    def correction(self, branch: str, readings: Tensor) -> Tensor:
        """(α/R) · Δ r for one branch: `[B, T, H·R]` to `[B, T, out]`."""
        with _full_precision(readings):
            return self.delta[branch](readings) * self.config.scale


def _full_precision(x: Tensor) -> AbstractContextManager[object]:
    """Without autocast, which would run the projections in half precision. An exported graph knows no autocast."""
    return nullcontext() if torch.compiler.is_exporting() else torch.autocast(x.device.type, enabled=False)


def _normalised(x: Tensor) -> Tensor:
    """l2norm(tanh(x)) over the R entries."""
    x = torch.tanh(x)
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2_EPS)

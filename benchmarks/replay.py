"""Replay recorded writes: find the part of the state that comes from one fact, and predict what is left of it.

The prediction is what the delta rule leaves if the other keys are random. `docs/capacity.md` has the derivation.

For given keys and gates, the state is linear in the values. So the contribution of some tokens is the state of a replay
in which all other values are zero; the other writes then only erase it and let it decay.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from deltamem_tool.ops.scan import delta_scan


@dataclass(frozen=True)
class Writes:
    """The writes of one layer over T tokens, as arguments of `delta_scan`; each is `[B, T, H, R]`."""

    k: Tensor
    v: Tensor
    log_keep: Tensor
    erase: Tensor
    write: Tensor

    def __add__(self, later: Writes) -> Writes:
        """Append `later` writes of the same conversations."""
        return Writes(*(torch.cat([mine, theirs], dim=1) for mine, theirs in zip(self.all, later.all, strict=True)))

    @property
    def all(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.k, self.v, self.log_keep, self.erase, self.write

    def state(self) -> Tensor:
        """Return the state `[B, H, R, R]` after the last token, from zeros."""
        batch, _, heads, rank = self.k.shape
        return delta_scan(self.k, *self.all, self.k.new_zeros(batch, heads, rank, rank))[1]

    def only(self, tokens: Tensor) -> Writes:
        """Keep only the values at `tokens` `[B, T]`: the resulting state is their share of the state."""
        return replace(self, v=self.v * _here(tokens, self.v))

    def until(self, tokens: Tensor) -> Writes:
        """Keep only the writes at `tokens` `[B, T]`; nothing happens at all others."""
        here = _here(tokens, self.v)
        return replace(self, log_keep=self.log_keep * here, erase=self.erase * here, write=self.write * here)

    def with_random_keys(self, tokens: Tensor, generator: torch.Generator) -> Writes:
        """Replace the keys at `tokens` `[B, T]` by random ones from the unit sphere."""
        drawn = F.normalize(torch.randn(self.k.shape, generator=generator), dim=-1).to(self.k)
        return replace(self, k=torch.where(_here(tokens, self.k).bool(), drawn, self.k))

    def with_rotated_keys(self, tokens: Tensor, generator: torch.Generator) -> Writes:
        """Rotate the keys at `tokens` `[B, T]` by a random rotation `[R, R]` per state. Products among these keys stay
        the same, so that repeated keys stay repeated, and products with other keys become random."""
        batch, _, heads, rank = self.k.shape
        q, r = torch.linalg.qr(torch.randn(batch, heads, rank, rank, generator=generator))
        rotations = q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)  # all equally likely (arXiv math-ph/0609050)
        turned = torch.einsum("bthi,bhij->bthj", self.k, rotations.to(self.k))
        return replace(self, k=torch.where(_here(tokens, self.k).bool(), turned, self.k))

    def expected_share(self, tokens: Tensor) -> Tensor:
        """Return the expected share of each state row `[B, H, R]` that writes with random keys at `tokens` `[B, T]`
        leave: Π (keep − erase / R), since E[k kᵀ] = I / R."""
        rank = self.k.shape[-1]
        left = self.log_keep.exp() - self.erase / rank
        return torch.where(_here(tokens, left).bool(), left, torch.ones_like(left)).prod(dim=1)


def read(state: Tensor, q: Tensor) -> Tensor:
    """Return the reading `[B, H, R]` of a state `[B, H, R, R]` by queries `[B, H, R]`."""
    return torch.einsum("bhij,bhj->bhi", state, q)


def retained(now: Tensor, first: Tensor) -> Tensor:
    """Return the share of `first` `[B, N]` that is left in `now`, by projection, `[B]`."""
    return (now * first).sum(-1) / (first * first).sum(-1)


def nearest(readings: Tensor, prototypes: Tensor) -> Tensor:
    """Return, for each of `readings` `[B, N]`, the index of the nearest of its `prototypes` `[B, C, N]`, `[B]`."""
    return (prototypes - readings.unsqueeze(1)).square().sum(-1).argmin(-1)


def _here(tokens: Tensor, like: Tensor) -> Tensor:
    return tokens[:, :, None, None].to(like.dtype).expand_as(like)

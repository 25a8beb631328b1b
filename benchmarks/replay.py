"""The recurrence again, on writes that were recorded: what of the state comes from one fact, and what the delta rule
would have left of it had the other keys been drawn at random. `docs/capacity.md` has the derivation.

For given keys and gates the state is linear in the values, so what some tokens have written is the state of a replay in
which all other values are zero; the others' writes then only erase and fade it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from deltamem_tool.ops.scan import delta_scan


@dataclass(frozen=True)
class Writes:
    """What one layer writes over T tokens, as `delta_scan` takes it; each `[B, T, H, R]`."""

    k: Tensor
    v: Tensor
    log_keep: Tensor
    erase: Tensor
    write: Tensor

    def __add__(self, later: Writes) -> Writes:
        """These, and `later` ones of the same conversations."""
        return Writes(*(torch.cat([mine, theirs], dim=1) for mine, theirs in zip(self.all, later.all, strict=True)))

    @property
    def all(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.k, self.v, self.log_keep, self.erase, self.write

    def state(self) -> Tensor:
        """`[B, H, R, R]` after the last token, from zeros."""
        batch, _, heads, rank = self.k.shape
        return delta_scan(self.k, *self.all, self.k.new_zeros(batch, heads, rank, rank))[1]

    def only(self, tokens: Tensor) -> Writes:
        """With values at `tokens` `[B, T]` alone: its state is their share of the state."""
        return replace(self, v=self.v * _here(tokens, self.v))

    def until(self, tokens: Tensor) -> Writes:
        """Of `tokens` `[B, T]` alone; at all others nothing happens."""
        here = _here(tokens, self.v)
        return replace(self, log_keep=self.log_keep * here, erase=self.erase * here, write=self.write * here)

    def with_random_keys(self, tokens: Tensor, generator: torch.Generator) -> Writes:
        """At `tokens` `[B, T]` keys from the unit sphere take the place of the keys."""
        drawn = F.normalize(torch.randn(self.k.shape, generator=generator), dim=-1).to(self.k)
        return replace(self, k=torch.where(_here(tokens, self.k).bool(), drawn, self.k))

    def with_rotated_keys(self, tokens: Tensor, generator: torch.Generator) -> Writes:
        """At `tokens` `[B, T]` the keys of a state are turned by one random rotation `[R, R]`, each state's by its own:
        what they are to each other stays, such as that one comes again; what they are to other keys is chance."""
        batch, _, heads, rank = self.k.shape
        q, r = torch.linalg.qr(torch.randn(batch, heads, rank, rank, generator=generator))
        rotations = q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)  # all equally likely (arXiv math-ph/0609050)
        turned = torch.einsum("bthi,bhij->bthj", self.k, rotations.to(self.k))
        return replace(self, k=torch.where(_here(tokens, self.k).bool(), turned, self.k))

    def expected_share(self, tokens: Tensor) -> Tensor:
        """`[B, H, R]`: the share of each state row that writes at `tokens` `[B, T]` with random keys leave in the mean,
        Π (keep − erase / R), since E[k kᵀ] = I / R."""
        rank = self.k.shape[-1]
        left = self.log_keep.exp() - self.erase / rank
        return torch.where(_here(tokens, left).bool(), left, torch.ones_like(left)).prod(dim=1)


def read(state: Tensor, q: Tensor) -> Tensor:
    """`[B, H, R, R]` and `[B, H, R]` to the reading `[B, H, R]`."""
    return torch.einsum("bhij,bhj->bhi", state, q)


def retained(now: Tensor, first: Tensor) -> Tensor:
    """The share of `first` `[B, N]` that `now` still has along it, `[B]`."""
    return (now * first).sum(-1) / (first * first).sum(-1)


def nearest(readings: Tensor, prototypes: Tensor) -> Tensor:
    """For each of `readings` `[B, N]`, which of its own `prototypes` `[B, C, N]` is nearest; `[B]`."""
    return (prototypes - readings.unsqueeze(1)).square().sum(-1).argmin(-1)


def _here(tokens: Tensor, like: Tensor) -> Tensor:
    return tokens[:, :, None, None].to(like.dtype).expand_as(like)

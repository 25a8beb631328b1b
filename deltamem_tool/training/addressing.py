"""A loss that teaches a memory its addresses: a question should find the key under which its answer was written.

A delta rule reads a sum of all written values, each weighted by the similarity of its key to the query. The
cross-entropy of the answers first teaches which values exist, and only much later which key belongs to each of them.
This loss teaches the keys directly. It is contrastive (InfoNCE, arXiv 1807.03748): the query of the token before an
answer token should be closer to the key of that same token in the history than to all other keys.

Queries and keys are computed from detached hidden states, so the gradients of this loss reach only the query and key
projections.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from deltamem_tool.memory.adapter import DeltaMemAdapter
from deltamem_tool.memory.layer import DeltaMemLayer
from deltamem_tool.ops.gates import normalise, per_head

TEMPERATURE = 0.1  # of cosines


@dataclass(frozen=True)
class Addresses:
    """The keys that N of a batch's scored tokens should find.

    Args:
        query_places: `[N]`, flat positions in the exchanges `[Q, T]` of the tokens before the scored ones.
        rows: `[N]`, the conversation of each scored token.
        positives: bool `[N, W]`, the positions of the same token in the history of its conversation.
        weights: `[N]`, one over the number of these positions.
        key_places: `[P]` and `[P]`, rows and positions in the histories of all positives, each of them once.
    """

    query_places: Tensor
    rows: Tensor
    positives: Tensor
    weights: Tensor
    key_places: tuple[Tensor, Tensor]

    @classmethod
    def from_batch(
        cls,
        write_ids: Tensor,
        write_mask: Tensor | None,
        read_ids: Tensor,
        scored: Tensor,
        targets: Tensor,
        rows: Tensor,
    ) -> Addresses:
        """Return the scored tokens that occur in the history, and have not occurred in their exchange before.

        The arguments are those of `data.collate.collate`, for B conversations: `[B, W]`, `[B, W]`, `[Q, T]`, `[N]`,
        `[N]`, `[Q]`.
        """
        length = read_ids.shape[1]
        exchange, place = scored // length, scored % length
        row = rows[exchange]
        positives = write_ids[row] == targets[:, None]
        if write_mask is not None:
            positives = positives & write_mask[row].bool()
        before = torch.arange(length, device=place.device) <= place[:, None]
        shown = ((read_ids[exchange] == targets[:, None]) & before).any(1)
        times = positives.sum(1)
        kept = ~shown & (times > 0)
        row, positives = row[kept], positives[kept]
        counts = torch.zeros(write_ids.shape, dtype=torch.int32, device=positives.device)
        counts = counts.index_add(0, row, positives.int())
        key_rows, places = counts.nonzero(as_tuple=True)
        return cls(scored[kept], row, positives, 1.0 / times[kept], (key_rows, places))

    @classmethod
    def upper_bound(
        cls,
        write_ids: Tensor,
        write_mask: Tensor | None,
        read_ids: Tensor,
        scored: Tensor,
        targets: Tensor,
        rows: Tensor,
    ) -> Addresses:
        """Return the most addresses possible: one position of its own for every scored token. Reads no values."""
        row = rows[scored // read_ids.shape[1]]
        positives = write_ids[row] == targets[:, None]
        return cls(scored, row, positives, torch.ones_like(row, dtype=torch.float32), (row, torch.zeros_like(row)))


@dataclass
class HiddenStates:
    """The inputs of each layer's memory, detached: `[B, T, D]` of every call, by layer."""

    calls: dict[int, list[Tensor]] = field(default_factory=dict)

    def take(self) -> dict[int, Tensor]:
        """Return those of all calls since the last time, concatenated in order."""
        joined = {layer: torch.cat(parts, dim=1) for layer, parts in self.calls.items()}
        self.calls.clear()
        return joined


@contextmanager
def hidden_states_of(adapter: DeltaMemAdapter) -> Iterator[HiddenStates]:
    """Record the inputs of the memories of `adapter` inside the block."""
    kept = HiddenStates()

    def keep(layer: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            kept.calls.setdefault(layer, []).append(args[0].detach())

        return hook

    handles = [adapter.layer(layer).register_forward_pre_hook(keep(layer)) for layer in adapter.layer_indices]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


def addressing_loss(
    adapter: DeltaMemAdapter,
    written: dict[int, Tensor],
    read: dict[int, Tensor],
    write_mask: Tensor | None,
    addresses: Addresses,
) -> Tensor:
    """Return the loss `[B]`, a mean over layers and heads: for each conversation, the weighted mean over its addresses.

    The positives of a token compete with all tokens of its conversation, and with the positives of other tokens in the
    batch.

    Args:
        adapter: adapter whose queries and keys are compared.
        written: hidden states of the histories `[B, W, D]`, by layer.
        read: hidden states of the exchanges `[Q, T, D]`, by layer.
        write_mask: `[B, W]`.
        addresses: the keys to find.
    """
    layers = [
        _layer_loss(adapter.layer(layer), written[layer].float(), read[layer].float(), write_mask, addresses)
        for layer in written
    ]
    losses = torch.stack(layers).mean(0) * addresses.weights  # [N]
    size = next(iter(written.values())).shape[0]
    sums, weights = (losses.new_zeros(size).index_add(0, addresses.rows, part) for part in (losses, addresses.weights))
    return sums / weights.clamp_min(torch.finfo(weights.dtype).tiny)


def _layer_loss(
    layer: DeltaMemLayer, written: Tensor, read: Tensor, write_mask: Tensor | None, addresses: Addresses
) -> Tensor:
    """The mean over heads, `[N]`."""
    rows, positives = addresses.rows, addresses.positives
    queries = normalise(per_head(layer.query(read.flatten(0, 1)[addresses.query_places, None]), layer.config))[:, 0]
    keys = normalise(per_head(layer.key(written), layer.config))  # [B, W, H, R]
    logits = torch.einsum("nhr,nwhr->nhw", queries, keys[rows]) / TEMPERATURE
    if write_mask is not None:
        logits = logits.masked_fill(~write_mask.bool()[rows, None], -torch.inf)
    row, place = addresses.key_places
    negatives = torch.einsum("nhr,phr->nhp", queries, keys[row, place]) / TEMPERATURE
    negatives = negatives.masked_fill((row == rows[:, None])[:, None], -torch.inf)  # these are in `logits`
    matched = logits.masked_fill(~positives[:, None], -torch.inf).logsumexp(-1)
    return (torch.cat([logits, negatives], dim=-1).logsumexp(-1) - matched).mean(1)

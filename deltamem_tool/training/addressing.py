"""A loss that teaches a memory its addresses: a question should find the key under which its answer was written.

A delta rule reads a sum of all written values, each weighted by the similarity of its key to the query. The
cross-entropy of the answers first teaches which values exist, and only much later which key belongs to each of them.
This loss teaches the keys directly. It is contrastive (InfoNCE, arXiv 1807.03748): the query of the token before an
answer token should be closer to the key of that same token in the history than to all other keys. Where segments are
written, the keys are those of segments, and it should be closest to those of the segments that contain the token.

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
from deltamem_tool.segments.tags import SegmentTag

TEMPERATURE = 0.1  # of cosines


@dataclass(frozen=True)
class WrittenSegments:
    """The segments of B histories that are written, at most S in one of them.

    Args:
        places: `[B, W]`, the segment of each token; S where the token belongs to none.
        count: S.
    """

    places: Tensor
    count: int

    @classmethod
    def from_tags(cls, tags: Tensor) -> WrittenSegments:
        """Return the segments of histories with segment tags `[B, W]`. One without its last token is not written."""
        last = tags == SegmentTag.LAST
        ends = last.cumsum(1)
        places = ends - last.long()
        count = int(ends[:, -1].max())
        written = (tags != SegmentTag.OUTSIDE) & (places < ends[:, -1:])
        return cls(places.masked_fill(~written, count), count)

    @property
    def mask(self) -> Tensor:
        """Bool `[B, S]`: whether a history has a segment of that number."""
        return self._sums(torch.ones_like(self.places)) > 0

    def contain(self, tokens: Tensor, rows: Tensor) -> Tensor:
        """Return bool `[N, S]`, which segments hold any of the tokens, bool `[N, W]`, of the histories `rows` `[N]`."""
        sums = torch.zeros(len(rows), self.count + 1, dtype=torch.long, device=tokens.device)
        return sums.scatter_add(1, self.places[rows], tokens.long())[:, : self.count] > 0

    def means(self, hidden: Tensor) -> Tensor:
        """Return the means `[B, S, D]` of the hidden states `[B, W, D]` of each segment, in float32."""
        hidden = hidden.float()  # first: a sum in bfloat16 stops growing after a few hundred tokens
        counts = self._sums(torch.ones_like(self.places)).clamp_min(1)
        sums = hidden.new_zeros(len(hidden), self.count + 1, hidden.shape[-1])
        return (
            sums.scatter_add(1, self.places[..., None].expand_as(hidden), hidden)[:, : self.count] / counts[..., None]
        )

    def _sums(self, values: Tensor) -> Tensor:
        """The sums `[B, S]` of values `[B, W]` over the tokens of each segment."""
        return values.new_zeros(len(values), self.count + 1).scatter_add(1, self.places, values)[:, : self.count]


@dataclass(frozen=True)
class Addresses:
    """The keys that N of a batch's scored tokens should find, among K of each history: of its W tokens, or S segments.

    Args:
        query_places: `[N]`, flat positions in the exchanges `[Q, T]` of the tokens before the scored ones.
        rows: `[N]`, the conversation of each scored token.
        positives: bool `[N, K]`, the keys in the history of its conversation that were written for the same token.
        weights: `[N]`, one over the number of these keys.
        key_places: `[P]` and `[P]`, rows and positions in the histories of all positives, each of them once.
        segments: the written segments; None if every token writes.
    """

    query_places: Tensor
    rows: Tensor
    positives: Tensor
    weights: Tensor
    key_places: tuple[Tensor, Tensor]
    segments: WrittenSegments | None = None

    @classmethod
    def from_batch(
        cls,
        write_ids: Tensor,
        write_mask: Tensor | None,
        read_ids: Tensor,
        scored: Tensor,
        targets: Tensor,
        rows: Tensor,
        write_segment_tags: Tensor | None = None,
    ) -> Addresses:
        """Return the scored tokens that occur in the history, and have not occurred in their exchange before.

        The arguments are those of `data.collate.collate`, for B conversations: `[B, W]`, `[B, W]`, `[Q, T]`, `[N]`,
        `[N]`, `[Q]`, and `[B, W]` if the memory writes by segments.
        """
        length = read_ids.shape[1]
        exchange, place = scored // length, scored % length
        row = rows[exchange]
        positives = write_ids[row] == targets[:, None]
        if write_mask is not None:
            positives = positives & write_mask[row].bool()
        segments = None if write_segment_tags is None else WrittenSegments.from_tags(write_segment_tags)
        if segments is not None:
            positives = segments.contain(positives, row)
        before = torch.arange(length, device=place.device) <= place[:, None]
        shown = ((read_ids[exchange] == targets[:, None]) & before).any(1)
        times = positives.sum(1)
        kept = ~shown & (times > 0)
        row, positives = row[kept], positives[kept]
        counts = torch.zeros(len(write_ids), positives.shape[1], dtype=torch.int32, device=positives.device)
        counts = counts.index_add(0, row, positives.int())
        key_rows, places = counts.nonzero(as_tuple=True)
        return cls(scored[kept], row, positives, 1.0 / times[kept], (key_rows, places), segments)

    @classmethod
    def upper_bound(
        cls,
        write_ids: Tensor,
        write_mask: Tensor | None,
        read_ids: Tensor,
        scored: Tensor,
        targets: Tensor,
        rows: Tensor,
        write_segment_tags: Tensor | None = None,
    ) -> Addresses:
        """Return the most addresses possible: a position of its own for every scored token, and a key for every token.

        Reads no values.
        """
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

    The positives of a token compete with all keys of its conversation, and with the positives of other tokens in the
    batch.

    Args:
        adapter: adapter whose queries and keys are compared.
        written: hidden states of the histories `[B, W, D]`, by layer.
        read: hidden states of the exchanges `[Q, T, D]`, by layer.
        write_mask: `[B, W]`.
        addresses: the keys to find.
    """
    segments = addresses.segments
    if segments is not None:  # the key of a segment is that of its mean
        written = {layer: segments.means(hidden) for layer, hidden in written.items()}
        write_mask = segments.mask
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

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
from deltamem_tool.ops.segment_sums import segment_means, segment_sums, segment_terms
from deltamem_tool.segments.tags import SegmentTag

TEMPERATURE = 0.1  # of cosines


@dataclass(frozen=True)
class WrittenSegments:
    """The segments of B histories of W tokens that are written, each at the place of its last token.

    Args:
        inside: bool `[B, W]`, the tokens of segments.
        last: bool `[B, W]`, their last tokens. What follows the last one is not written.
    """

    inside: Tensor
    last: Tensor

    @classmethod
    def from_tags(cls, tags: Tensor) -> WrittenSegments:
        """Return the segments of histories with segment tags `[B, W]`."""
        return cls(tags != SegmentTag.OUTSIDE, tags == SegmentTag.LAST)

    def means(self, x: Tensor) -> Tensor:
        """Return the means of `x` `[B, W, N]` over each segment, at its last token; the others have no meaning."""
        terms = segment_terms((x,)).masked_fill(~self.inside[..., None], 0.0)
        sums, _ = segment_sums(terms, self.last, torch.zeros_like(terms[:, 0]))
        return segment_means(sums)[0]

    def contain(self, tokens: Tensor, rows: Tensor) -> Tensor:
        """Return the segments, bool `[N, W]`, with any of the tokens, bool `[N, W]`, of the histories `rows` `[N]`."""
        last, counted = self.last[rows], (tokens & self.inside[rows]).float()[..., None]
        sums, _ = segment_sums(counted, last, torch.zeros_like(counted[:, 0]))
        return last & (sums[..., 0] > 0)


@dataclass(frozen=True)
class Addresses:
    """The keys that N of a batch's scored tokens should find, among those of the W tokens, or segments, of a history.

    Args:
        query_places: `[N]`, flat positions in the exchanges `[Q, T]` of the tokens before the scored ones.
        rows: `[N]`, the conversation of each scored token.
        positives: bool `[N, W]`, the keys in the history of its conversation that were written for the same token; that
            of a segment is at its last token.
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
        counts = torch.zeros(write_ids.shape, dtype=torch.int32, device=positives.device)
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
    raw_keys = layer.key(written)  # [B, W, H·R]
    if addresses.segments is not None:
        raw_keys, write_mask = addresses.segments.means(raw_keys), addresses.segments.last
    keys = normalise(per_head(raw_keys, layer.config))  # [B, W, H, R]
    logits = torch.einsum("nhr,nwhr->nhw", queries, keys[rows]) / TEMPERATURE
    if write_mask is not None:
        logits = logits.masked_fill(~write_mask.bool()[rows, None], -torch.inf)
    row, place = addresses.key_places
    negatives = torch.einsum("nhr,phr->nhp", queries, keys[row, place]) / TEMPERATURE
    negatives = negatives.masked_fill((row == rows[:, None])[:, None], -torch.inf)  # these are in `logits`
    matched = logits.masked_fill(~positives[:, None], -torch.inf).logsumexp(-1)
    return (torch.cat([logits, negatives], dim=-1).logsumexp(-1) - matched).mean(1)

"""Batch encoded episodes into the tensors of one training step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from deltamem_tool.data.encode import IGNORED, EncodedEpisode, EncodedExchange, Encoder
from deltamem_tool.data.episode import Episode
from deltamem_tool.data.unrelated_exchanges import UnrelatedExchanges
from deltamem_tool.segments.encode import pad_rows
from deltamem_tool.segments.tags import SegmentTag


def collate(episodes: Sequence[EncodedEpisode], pad: int, segments: bool) -> dict[str, Tensor]:
    """Make one batch of B episodes, which have Q exchanges in all.

    Padding is on the right, `pad` with mask 0.

    Returns:
        `write_ids`, `write_mask` `[B, W]`, and with `segments` `write_segment_tags` `[B, W]`; `read_ids`, `read_mask`,
        `labels` `[Q, T]`; `rows` `[Q]`, the episode of each exchange; `scored` `[N]`, the places b * T + t of
        `read_ids` whose next token is scored, row by row, and `targets` `[N]`, those next tokens. Where all episodes
        have a `full` view: `full_ids`, `full_mask` `[Q, F]` and `full_scored` `[N]`, the same places in that view.
    """
    exchanges = [exchange for episode in episodes for exchange in episode.exchanges]
    written = [episode.write_ids for episode in episodes]
    labels = _labels(exchanges)
    scored = _before_scored(labels)
    batch = {
        "write_ids": pad_rows(written, pad),
        "write_mask": _mask(written),
        "read_ids": pad_rows([exchange.ids for exchange in exchanges], pad),
        "read_mask": _mask([exchange.ids for exchange in exchanges]),
        "labels": labels,
        "rows": torch.tensor([row for row, episode in enumerate(episodes) for _ in episode.exchanges]),
        "scored": scored,
        "targets": labels.flatten()[scored + 1],  # the next place in the row: the last of a row is never among them
    }
    if segments:
        batch["write_segment_tags"] = pad_rows(
            [episode.tags for episode in episodes], SegmentTag.OUTSIDE, dtype=torch.int8
        )
    if all(episode.full for episode in episodes):
        full = [exchange for episode in episodes for exchange in episode.full]
        batch["full_ids"] = pad_rows([exchange.ids for exchange in full], pad)
        batch["full_mask"] = _mask([exchange.ids for exchange in full])
        batch["full_scored"] = _before_scored(_labels(full))
    return batch


def collate_unrelated(exchanges: Sequence[EncodedExchange], pad: int) -> dict[str, Tensor]:
    """Make the part of a batch that no memory is needed for, an exchange for each of its B episodes.

    Returns:
        `unrelated_ids`, `unrelated_mask` `[B, U]`; `unrelated_scored` `[M]`, flat places of them as `scored` has those
        of `read_ids`.
    """
    ids = [exchange.ids for exchange in exchanges]
    return {
        "unrelated_ids": pad_rows(ids, pad),
        "unrelated_mask": _mask(ids),
        "unrelated_scored": _before_scored(_labels(exchanges)),
    }


def _labels(exchanges: Sequence[EncodedExchange]) -> Tensor:
    return pad_rows([exchange.labels for exchange in exchanges], IGNORED)


def _before_scored(labels: Tensor) -> Tensor:
    """Return the flat positions of `labels` `[Q, T]` whose next label is scored."""
    ahead = torch.zeros_like(labels, dtype=torch.bool)
    ahead[:, :-1] = labels[:, 1:] != IGNORED
    return ahead.flatten().nonzero().flatten()


def _mask(rows: Sequence[Sequence[int]]) -> Tensor:
    return pad_rows([[1] * len(row) for row in rows], 0)


class EpisodeCollator:
    """Make batches for the Trainer as `collate` does, with `sources`: where each episode was read.

    Episodes that are not encoded yet are read with the memory alone, since `EncodedEpisodes` does the context dropout.

    Args:
        encoder: encodes these episodes.
        unrelated: exchanges that are also read with each episode's memory; see `collate_unrelated`.
    """

    def __init__(self, encoder: Encoder, unrelated: UnrelatedExchanges | None = None) -> None:
        self.encoder, self.unrelated = encoder, unrelated

    def __call__(self, episodes: Sequence[Episode] | Sequence[EncodedEpisode]) -> dict[str, Any]:
        """Make a batch of `episodes`."""
        if episodes and isinstance(episodes[0], Episode):
            encoded = self.encoder(cast(Sequence[Episode], episodes))
        else:
            encoded = cast(list[EncodedEpisode], episodes)
        batch = collate(encoded, self.encoder.pad, self.encoder.granularity != "token")
        if self.unrelated is not None:
            batch |= collate_unrelated([self.unrelated.for_episode(episode) for episode in encoded], self.encoder.pad)
        return {**batch, "sources": [episode.where for episode in encoded]}

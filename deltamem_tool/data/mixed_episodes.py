"""Mix generated episodes into the user's own conversations."""

from __future__ import annotations

import math

import torch
from torch.utils.data import Dataset

from deltamem_tool.data.encode import EncodedEpisode, Encoder
from deltamem_tool.data.fact_episodes import FactEpisodes
from deltamem_tool.data.store import EncodedEpisodes
from deltamem_tool.data.synthetic import DialogueEpisodes


class MixedEpisodes(Dataset[EncodedEpisode]):
    """All episodes of a run, in their order: of any n of them, the whole part of `mix` · n are generated.

    The conversations come epoch after epoch, each in an order of its own. Episode i depends on `seed` and i alone.

    Args:
        conversations: the user's own.
        generated: generated episodes; if episode i of the run is a generated one, it is the i-th of these.
        encoder: encodes the generated episodes.
        mix: share of generated episodes.
        seed: random seed of the order.
    """

    def __init__(
        self,
        conversations: EncodedEpisodes,
        generated: DialogueEpisodes | FactEpisodes,
        encoder: Encoder,
        mix: float,
        seed: int,
    ) -> None:
        self.conversations, self.generated = conversations, generated
        self.encoder, self.mix, self.seed = encoder, mix, seed
        self._order: tuple[int, list[int]] = (-1, [])  # of one epoch

    def __len__(self) -> int:
        return len(self.generated)

    def __getitem__(self, index: int) -> EncodedEpisode:
        if not 0 <= index < len(self):
            raise IndexError(index)
        before = math.floor(index * self.mix)  # generated ones
        if math.floor((index + 1) * self.mix) > before:
            return self.encoder([self.generated[index]])[0]
        epoch, place = divmod(index - before, len(self.conversations))
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed + epoch)
            self._order = epoch, torch.randperm(len(self.conversations), generator=generator).tolist()
            self.conversations.set_epoch(epoch)
        return self.conversations[self._order[1][place]]

"""Exchanges that need no memory, one for each episode, to be answered as the base model does."""

from __future__ import annotations

import random
from collections.abc import Sequence

from deltamem_tool.data.encode import EncodedEpisode, EncodedExchange


class UnrelatedExchanges:
    """Which of `exchanges` is read with an episode's memory: that depends on what is written, and on `seed`, alone.

    So a resumed run, and every process, draws what one run would.
    """

    def __init__(self, exchanges: Sequence[EncodedExchange], seed: int) -> None:
        self._exchanges, self._seed = exchanges, seed

    @property
    def longest(self) -> EncodedExchange:
        """The exchange with the most tokens."""
        return max(self._exchanges, key=lambda exchange: len(exchange.ids))

    def for_episode(self, episode: EncodedEpisode) -> EncodedExchange:
        """Draw the exchange for an episode."""
        return random.Random(f"{self._seed}/{episode.write_ids}").choice(self._exchanges)

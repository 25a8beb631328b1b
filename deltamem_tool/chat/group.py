"""Rows that are fed together, one token at a time, while others come and go."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from deltamem_tool.chat.engine import Engine, Past
from deltamem_tool.chat.generation import Token
from deltamem_tool.memory.file import StoredMemory


class Group(Protocol):
    """A batch that changes in place, unlike a past. For one thread."""

    def exchange(self, leaving: Collection[int], pasts: Sequence[Past], lengths: Sequence[int]) -> list[int]:
        """Let rows go, and let others join behind those that stay.

        Args:
            leaving: rows.
            pasts: of one row each.
            lengths: how many tokens each of them has.

        Returns:
            Which of the former rows is in each place now.
        """

    def step(self, tokens: Sequence[Token]) -> NDArray[Any]:
        """Feed a token to each row; return the logits `[B, V]`, which hold until the next step."""

    def memory(self, row: int) -> StoredMemory:
        """States and open segments of a row, copied."""


class PaddedGroup:
    """A group of any engine: one past, padded on the left as much as its longest row needs.

    Whenever a row leaves, all rows are copied.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._past: Past = None
        self._lengths = np.zeros(0, np.int64)

    def exchange(self, leaving: Collection[int], pasts: Sequence[Past], lengths: Sequence[int]) -> list[int]:
        """See `Group.exchange`."""
        staying = [row for row in range(len(self._lengths)) if row not in leaving]
        parts = [] if not staying else [self._past] if not leaving else [self._taken(row) for row in staying]
        parts += pasts
        self._past = self._engine.join(parts) if parts else None
        self._lengths = np.array([*self._lengths[staying], *lengths], np.int64)
        return staying

    def _taken(self, row: int) -> Past:
        width = self._lengths.max()
        return self._engine.take(self._past, row, np.arange(width - self._lengths[row], width))

    def step(self, tokens: Sequence[Token]) -> NDArray[Any]:
        """See `Group.step`."""
        self._lengths += 1
        width = self._lengths.max()
        mask = np.arange(width) >= width - self._lengths[:, None]
        ids, writes, ends = (np.array(column)[:, None] for column in zip(*tokens, strict=True))
        segment_end = ends if self._engine.memory_shape.segment_width else None
        logits, self._past = self._engine.step(self._past, ids, mask.astype(np.int64), writes, segment_end)
        return logits

    def memory(self, row: int) -> StoredMemory:
        """See `Group.memory`."""
        return self._engine.memory(self._past).row(row)

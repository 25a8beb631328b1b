"""Rows that are fed together, one token at a time, while others join and leave."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from deltamem_tool.chat.engine import Engine, Past
from deltamem_tool.chat.generation import Token
from deltamem_tool.memory.file import StoredMemory


class PastRow(NamedTuple):
    """A row of a past.

    Args:
        past: past with `rows` rows and `columns` columns.
        rows: number of rows.
        columns: number of columns.
        row: index of the row.
        length: number of tokens of that row, which are in its last columns.
    """

    past: Past
    rows: int
    columns: int
    row: int
    length: int

    def separate(self, engine: Engine) -> Past:
        """Return a past with only this row."""
        if self.rows == 1:
            return self.past
        return engine.take(self.past, self.row, np.arange(self.columns - self.length, self.columns))

    def memory(self, engine: Engine) -> StoredMemory:
        """Return a copy of the row's memory: states and open segments."""
        memory = engine.memory(self.past)
        return memory if self.rows == 1 else memory.row(self.row)


class Group(Protocol):
    """A batch that changes in place, unlike a past. For use by one thread."""

    def exchange(self, leaving: Collection[int], joining: Sequence[PastRow]) -> list[int]:
        """Remove rows, and add others behind the remaining ones.

        Args:
            leaving: indices of the rows to remove.
            joining: rows of other pasts to add.

        Returns:
            For each place, the former row that is there now.
        """

    def step(self, tokens: Sequence[Token]) -> NDArray[Any]:
        """Feed one token to each row, and return the logits `[B, V]`, which are valid until the next step."""

    def memory(self, row: int) -> StoredMemory:
        """Return a copy of a row's memory: states and open segments."""


class PaddedGroup:
    """A group for any engine: one past, padded on the left to the length of its longest row.

    Whenever a row leaves, all rows are copied.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._past: Past = None
        self._lengths = np.zeros(0, np.int64)

    def exchange(self, leaving: Collection[int], joining: Sequence[PastRow]) -> list[int]:
        """See `Group.exchange`."""
        staying = [row for row in range(len(self._lengths)) if row not in leaving]
        parts = [] if not staying else [self._past] if not leaving else [self._keep_rows(staying)]
        parts += [part.separate(self._engine) for part in joining]
        self._past = self._engine.join(parts) if parts else None
        self._lengths = np.array([*self._lengths[staying], *(part.length for part in joining)], np.int64)
        return staying

    def _keep_rows(self, rows: Sequence[int]) -> Past:
        width = self._lengths.max()
        return self._engine.keep(self._past, {row: np.arange(width - self._lengths[row], width) for row in rows})

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

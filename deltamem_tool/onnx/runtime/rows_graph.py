"""Run a graph whose base model uses columns as positions. Each row is fed in separate calls, without padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltamem_tool.onnx.runtime.graph import Graph, Past

Arrays = Mapping[int, NDArray[Any]]


@dataclass(frozen=True)
class RowsPast:
    """A batch of conversations between two calls.

    Args:
        rows: the past of each row, which only holds its valid tokens.
        mask: int64 `[B, P]`, mask of the tokens so far, 0 at padding.
    """

    rows: tuple[Past, ...]
    mask: NDArray[Any]


class RowsGraph(Graph):
    """A graph that does the same as `Graph`, with `RowsPast` as pasts."""

    def empty_past(self, batch: int, states: Arrays | None = None, segments: Arrays | None = None) -> Any:
        """See `Graph.empty_past`."""
        rows = (super(RowsGraph, self).empty_past(1, _row(states, i), _row(segments, i)) for i in range(batch))
        return RowsPast(tuple(rows), np.zeros((batch, 0), np.int64))

    def with_memory(self, past: Any, states: Arrays, segments: Arrays) -> Any:
        """See `Graph.with_memory`."""
        rows = (
            super(RowsGraph, self).with_memory(row, _row(states, i) or {}, _row(segments, i) or {})
            for i, row in enumerate(past.rows)
        )
        return RowsPast(tuple(rows), past.mask)

    def memory_part(self, past: Any, part: str) -> dict[int, NDArray[Any]]:
        """See `Graph.memory_part`."""
        rows = [super(RowsGraph, self).memory_part(row, part) for row in past.rows]
        return {layer: np.concatenate([row[layer] for row in rows]) for layer in rows[0]}

    def step(
        self,
        input_ids: NDArray[Any],
        attention_mask: NDArray[Any],
        write_mask: NDArray[Any],
        past: Any,
        segment_end: NDArray[Any] | None = None,
    ) -> tuple[NDArray[Any], Any]:
        """See `Graph.step`. Logits are zeros at padding, and the last ones are those of each row's last token."""
        valid = attention_mask[:, past.mask.shape[1] :] > 0
        positions = 1 if self.interface.logits == "last" else valid.shape[1]
        logits = np.zeros((len(valid), positions, self.interface.vocab_size), np.float32)
        rows = list(past.rows)
        for row, new in enumerate(valid):
            if not new.any():
                continue
            mask = np.ones((1, int(past.mask[row].sum() + new.sum())), np.int64)
            ids, write = (array[row : row + 1, new] for array in (input_ids, write_mask))
            end = None if segment_end is None else segment_end[row : row + 1, new]
            of_row, rows[row] = super().step(ids, mask, write, rows[row], end)
            logits[row, new if positions > 1 else slice(None)] = of_row[0]
        return logits, RowsPast(tuple(rows), attention_mask)

    def size(self, past: Any) -> int:
        """See `Graph.size`."""
        return sum(super(RowsGraph, self).size(row) for row in past.rows)

    def take(self, past: Any, row: int, columns: NDArray[Any]) -> Any:
        """See `Graph.take`."""
        mask = past.mask[row]
        places = (mask.cumsum() - 1)[columns][mask[columns] > 0]
        return RowsPast((super().take(past.rows[row], 0, places),), mask[None, columns])

    def join(self, pasts: Sequence[Any]) -> Any:
        """See `Graph.join`."""
        length = max(past.mask.shape[1] for past in pasts)
        masks = [np.pad(past.mask, ((0, 0), (length - past.mask.shape[1], 0))) for past in pasts]
        return RowsPast(tuple(row for past in pasts for row in past.rows), np.concatenate(masks))


def _row(arrays: Arrays | None, row: int) -> dict[int, NDArray[Any]] | None:
    return None if arrays is None else {layer: array[row : row + 1] for layer, array in arrays.items()}

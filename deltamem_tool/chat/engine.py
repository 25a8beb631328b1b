"""The interface between conversations and a runtime, implemented once for ONNX Runtime and once for PyTorch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from deltamem_tool.base_model.limits import unknown_token
from deltamem_tool.chat.text import ChatText
from deltamem_tool.config import DeltaMemConfig
from deltamem_tool.memory.file import MemoryShape, StoredMemory

if TYPE_CHECKING:
    from deltamem_tool.chat.group import Group

Past = Any  # KV cache and memory of a batch, as the engine keeps it; never changed


class Engine(Protocol):
    """A loaded model.

    A past is the KV cache and the memory of a batch. Every call returns new pasts and leaves the old ones unchanged, so
    that one engine can serve many conversations from many threads.

    text: tokenizer and chat template.
    stop_tokens: token ids that end an answer.
    adapter: fingerprint of the adapter, to which its memories are bound.
    mechanism: options of the adapter.
    memory_shape: shapes of its memories.
    max_length: maximum number of tokens in a past, or of positions in the model; None for no limit.
    takes_back: whether tokens can be removed from a past. A hybrid model, whose layers keep more than keys and values,
        does not support that.
    """

    text: ChatText
    stop_tokens: frozenset[int]
    adapter: str
    mechanism: DeltaMemConfig
    memory_shape: MemoryShape
    max_length: int | None
    takes_back: bool

    def start(self, memory: StoredMemory) -> Past:
        """Return a past without tokens, with the given memory: one row per conversation."""

    def step(
        self,
        past: Past,
        input_ids: NDArray[Any],
        attention_mask: NDArray[Any],
        write_mask: NDArray[Any],
        segment_end: NDArray[Any] | None = None,
        all_positions: bool = False,
    ) -> tuple[NDArray[Any], Past]:
        """Feed tokens to the model.

        Args:
            past: a past with B rows of P tokens.
            input_ids: int64 `[B, T]`.
            attention_mask: int64 `[B, P + T]`, 0 at padding.
            write_mask: bool `[B, T]`, the tokens that write or belong to a segment; padding never does.
            segment_end: bool `[B, T]`, the tokens that end a segment; None if every token writes.
            all_positions: return the logits of every position instead of the last one only.

        Returns:
            Logits float32 `[B, V]` of the last position, or `[B, T, V]`; and the past of P + T tokens.

        Raises:
            DataError: a token id is unknown to the model.
            ExportError: `all_positions` is set, but the graph has the logits of the last position only.
        """

    def memory(self, past: Past) -> StoredMemory:
        """Return a copy of the memory: states and open segments."""

    def with_memory(self, past: Past, memory: StoredMemory) -> Past:
        """Return the past with the same tokens and another memory."""

    def take(self, past: Past, row: int, columns: NDArray[Any]) -> Past:
        """Return one row with the tokens at the indices `columns`, and its memory unchanged.

        If `takes_back` is False, these must be all of its tokens, or none.
        """

    def keep(self, past: Past, columns: Mapping[int, NDArray[Any]]) -> Past:
        """Return some rows of a batch, as `take` and `join` would.

        Args:
            past: the past of the whole batch.
            columns: for each row to keep, the indices of all of its tokens, which are in the last columns.
        """

    def join(self, pasts: Sequence[Past]) -> Past:
        """Return the rows of all `pasts` as one batch. Shorter rows are padded on the left, and need a mask there."""

    def size(self, past: Past) -> int:
        """Return the size of a past in bytes."""

    def group(self) -> Group:
        """Return a group without rows, for many decode steps between which rows can join and leave."""


def check_ids(text: ChatText, input_ids: NDArray[Any], vocabulary: int | None) -> None:
    """Check that all of `input_ids` are within a vocabulary of this size.

    Raises:
        DataError: one of them is not.
    """
    largest = int(input_ids.max(initial=0))
    if vocabulary is not None and largest >= vocabulary:
        raise unknown_token(text.tokenizer.id_to_token(largest), largest, vocabulary)


def empty_memory(engine: Engine) -> StoredMemory:
    """Return a memory of zeros for one conversation."""
    shape = engine.memory_shape
    states = {layer: np.zeros((1, *sizes), np.float32) for layer, sizes in shape.layers.items()}
    segments = {layer: np.zeros((1, shape.segment_width), np.float32) for layer in shape.layers if shape.segment_width}
    return StoredMemory(states, segments, engine.adapter)

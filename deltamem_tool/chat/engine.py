"""What a runtime has to do for conversations: ONNX Runtime and PyTorch each have a class that does it."""

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

    Every call returns new pasts and leaves the old ones as they are, so that one engine serves many conversations from
    many threads.

    text: tokens and chat template.
    stop_tokens: ids that end an answer.
    adapter: fingerprint of the adapter, which its memories belong to.
    mechanism: the adapter's options.
    memory_shape: what its memories measure.
    max_length: the most tokens that a past can hold, or that the model has positions for; None for any number.
    takes_back: whether tokens can be taken out of a past. A hybrid, whose layers keep more than keys and values, cannot
        do that.
    """

    text: ChatText
    stop_tokens: frozenset[int]
    adapter: str
    mechanism: DeltaMemConfig
    memory_shape: MemoryShape
    max_length: int | None
    takes_back: bool

    def start(self, memory: StoredMemory) -> Past:
        """No tokens yet, and the given memory, a row for each conversation."""

    def step(
        self,
        past: Past,
        input_ids: NDArray[Any],
        attention_mask: NDArray[Any],
        write_mask: NDArray[Any],
        segment_end: NDArray[Any] | None = None,
        all_positions: bool = False,
    ) -> tuple[NDArray[Any], Past]:
        """Feed tokens.

        Args:
            past: of B rows and P tokens.
            input_ids: int64 `[B, T]`.
            attention_mask: int64 `[B, P + T]`, 0 at padding.
            write_mask: bool `[B, T]`, which tokens write or belong to a segment; padding never does.
            segment_end: bool `[B, T]`, which tokens end a segment; None where every token writes.
            all_positions: return the logits of every position, not of the last alone.

        Returns:
            Logits `[B, V]` of the last position, or `[B, T, V]`, float32; and the past of P + T tokens.

        Raises:
            DataError: an id is not one of the model's.
            ExportError: `all_positions` is set, and the graph has logits of the last position only.
        """

    def memory(self, past: Past) -> StoredMemory:
        """States and open segments, copied."""

    def with_memory(self, past: Past, memory: StoredMemory) -> Past:
        """The same tokens with another memory."""

    def take(self, past: Past, row: int, columns: NDArray[Any]) -> Past:
        """One row, with those of its tokens that `columns`, indices, names; its memory as it is.

        Where `takes_back` is False these must be all of its tokens, or none.
        """

    def keep(self, past: Past, columns: Mapping[int, NDArray[Any]]) -> Past:
        """Some rows of a batch, as `take` and `join` would give them.

        Args:
            past: of more rows.
            columns: of each row that is kept, indices of all of its tokens, which are in the last columns.
        """

    def join(self, pasts: Sequence[Past]) -> Past:
        """The rows of all `pasts` as one batch; shorter ones are padded on the left, which the mask has to say."""

    def size(self, past: Past) -> int:
        """Bytes that a past takes."""

    def group(self) -> Group:
        """No rows yet, for many decode steps: rows come and go in between."""


def check_ids(text: ChatText, input_ids: NDArray[Any], vocabulary: int | None) -> None:
    """Check that a model with so many embeddings knows all of `input_ids`.

    Raises:
        DataError: it does not.
    """
    largest = int(input_ids.max(initial=0))
    if vocabulary is not None and largest >= vocabulary:
        raise unknown_token(text.tokenizer.id_to_token(largest), largest, vocabulary)


def empty_memory(engine: Engine) -> StoredMemory:
    """Zeros, of one conversation."""
    shape = engine.memory_shape
    states = {layer: np.zeros((1, *sizes), np.float32) for layer, sizes in shape.layers.items()}
    segments = {layer: np.zeros((1, shape.segment_width), np.float32) for layer in shape.layers if shape.segment_width}
    return StoredMemory(states, segments, engine.adapter)

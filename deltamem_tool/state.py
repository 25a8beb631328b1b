"""What a conversation remembers, as a value; and the cache that carries it through `generate()`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from deltamem_tool.errors import MemoryStateError
from deltamem_tool.memory_file import check_memory, read_memory, write_memory
from deltamem_tool.patched import patch_of


class MemoryState:
    """The states of all layers of one batch of conversations. Never changed in place: every method returns a new one.

    Args:
        layers: float32 `[B, H, R, R]` by decoder layer index, indexed [value row, key column].
        adapter: fingerprint of the adapter that the states belong to.

    Raises:
        MemoryStateError: a state is not float32 `[B, H, R, R]`, or the layers disagree on B.
    """

    def __init__(self, layers: Mapping[int, Tensor], adapter: str) -> None:
        self.layers = dict(layers)
        self.adapter = adapter
        for layer, state in self.layers.items():
            if state.ndim != 4 or state.shape[2] != state.shape[3] or state.dtype != torch.float32:
                raise MemoryStateError(
                    f"The state of layer {layer} is no memory.",
                    f"It is {state.dtype} {list(state.shape)}, not float32 [B, H, R, R].",
                    "Pass states as a MemoryCache returns them.",
                )
        if not self.layers or any(state.shape[0] != self.batch_size for state in self.layers.values()):
            raise MemoryStateError("The layers of this memory disagree on the batch size.", "", "Pass one batch.")

    def __repr__(self) -> str:
        _, heads, rank, _ = next(iter(self.layers.values())).shape
        return f"MemoryState(batch={self.batch_size}, layers={len(self.layers)}, heads={heads}, rank={rank})"

    @property
    def batch_size(self) -> int:
        return next(iter(self.layers.values())).shape[0]

    @property
    def nbytes(self) -> int:
        return sum(state.nbytes for state in self.layers.values())

    def shapes(self) -> dict[int, tuple[int, ...]]:
        """`(H, R, R)` by layer."""
        return {layer: tuple(state.shape[1:]) for layer, state in self.layers.items()}

    def clone(self) -> MemoryState:
        """An independent copy, cut off from autograd."""
        return self._map(lambda state: state.detach().clone())

    def fork(self, copies: int) -> MemoryState:
        """Every row `copies` times, the copies of a row side by side: `[B·copies, H, R, R]`."""
        return self._map(lambda state: state.repeat_interleave(copies, dim=0))

    def select(self, rows: Tensor | list[int]) -> MemoryState:
        """The given rows, in the given order, repeats allowed."""
        return self._map(lambda state: state.index_select(0, torch.as_tensor(rows, device=state.device)))

    def to(self, device: torch.device | str) -> MemoryState:
        return self._map(lambda state: state.to(device))

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, whole or not at all; `load` gives the same bits back."""
        write_memory(path, {i: state.detach().cpu().numpy() for i, state in self.layers.items()}, self.adapter)

    @classmethod
    def load(cls, path: str | Path) -> MemoryState:
        """Read a memory file.

        Raises:
            MemoryStateError: the file is missing, damaged, or newer than this version.
        """
        states, adapter = read_memory(path)
        return cls({layer: torch.from_numpy(state) for layer, state in states.items()}, adapter)

    def _map(self, change) -> MemoryState:
        return MemoryState({layer: change(state) for layer, state in self.layers.items()}, self.adapter)


class MemoryCache(DynamicCache):
    """The KV cache of a patched model together with its memory: pass it as `past_key_values`.

    After beam search `memory` holds the states of the beams that were still running, not of the sequences returned.

    Args:
        model: a model that `attach` or `load` has given a memory.
        memory: where to start; None starts from zeros. It is not changed: read the new one from `cache.memory`.
        write: whether tokens write. A bool `[B, T]` tensor says it token by token, for one call.

    Raises:
        MemoryStateError: `memory` belongs to another adapter, or has other layers, heads or rank.
    """

    def __init__(self, model: PreTrainedModel, memory: MemoryState | None = None, write: bool | Tensor = True) -> None:
        super().__init__(config=model.config)
        adapter = patch_of(model).adapter
        self.write = write
        self.memory = memory
        self._stop_tokens: Tensor | None = None
        self._feeding: str | None = None  # what `generate` feeds next; None outside of it
        self._finished: Tensor | None = None  # [B] rows that `generate` goes on feeding after their end
        if memory is not None:
            check_memory(memory.shapes(), memory.adapter, adapter.state_shapes(), adapter.fingerprint)

    def begin_generation(self, stop_tokens: Tensor | None) -> None:
        """`generate` starts: rows that produce one of `stop_tokens` will no longer read or write."""
        self._finished, self._stop_tokens = None, stop_tokens

    def begin_step(self, prompt: bool) -> None:
        """`generate` feeds the prompt next, or else a token that it has produced. Only the latter can end a row."""
        self._feeding = "prompt" if prompt else "produced"

    def unfinished(self, tokens: Tensor | None) -> Tensor | None:
        """Rows `[B, 1]` whose `tokens` `[B, T]` still belong to the conversation; None where all do."""
        feeding, self._feeding = self._feeding, None
        if feeding != "produced" or self._stop_tokens is None or tokens is None:
            return None
        ended = torch.isin(tokens, self._stop_tokens.to(tokens.device)).any(dim=1)
        self._finished = ended if self._finished is None else self._finished | ended
        return ~self._finished[:, None]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx.long())  # type: ignore[arg-type]  # LongTensor is a type of its own to mypy
        self._take(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._take(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.get_seq_length() > 0:  # empty layers have no rows to repeat
            super().batch_repeat_interleave(repeats)
        if self.memory is not None:
            self.memory = self.memory.fork(repeats)

    def reset(self) -> None:
        super().reset()
        self.memory, self._finished, self._feeding = None, None, None

    @property
    def is_croppable(self) -> bool:
        return False

    def crop(self, tokens_to_remove: int) -> None:
        raise MemoryStateError(
            "A memory cannot forget its last tokens.",
            "What a token wrote is mixed into the state; assisted and speculative decoding need to take tokens back.",
            "Decode without an assistant, or keep `cache.memory` from before and start from it.",
        )

    def _take(self, rows: Tensor) -> None:
        if self.memory is not None:
            self.memory = self.memory.select(rows)
        if self._finished is not None:
            self._finished = self._finished.index_select(0, rows.to(self._finished.device))

"""What a conversation remembers, as a value; and the cache that carries it through `generate()`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

from deltamem_tool.config import DeltaMemConfig
from deltamem_tool.errors import MemoryStateError
from deltamem_tool.memory import end_segment
from deltamem_tool.memory_file import MemoryShape, StoredMemory, check_memory, read_memory, write_memory
from deltamem_tool.patched import patch_of


class MemoryState:
    """The states of all layers of one batch of conversations. Never changed in place: every method returns a new one.

    Args:
        layers: float32 `[B, H, R, R]` by decoder layer index, indexed [value row, key column].
        adapter: fingerprint of the adapter that the states belong to.
        segments: where the adapter writes by segments, float32 `[B, W]` by layer: what the open segment has gathered,
            its number of tokens last (W is `DeltaMemConfig.segment_width`). Empty where every token writes.

    Raises:
        MemoryStateError: a tensor is not float32 of that shape, or the layers disagree on B.
    """

    def __init__(
        self, layers: Mapping[int, Tensor], adapter: str, segments: Mapping[int, Tensor] | None = None
    ) -> None:
        self.layers = dict(layers)
        self.segments = dict(segments or {})
        self.adapter = adapter
        for layer, state in self.layers.items():
            if state.ndim != 4 or state.shape[2] != state.shape[3] or state.dtype != torch.float32:
                raise _no_memory(f"state of layer {layer}", state, "[B, H, R, R]")
        for layer, segment in self.segments.items():
            if segment.ndim != 2 or segment.dtype != torch.float32:
                raise _no_memory(f"open segment of layer {layer}", segment, "[B, W]")
        tensors = [*self.layers.values(), *self.segments.values()]
        fits = all(tensor.shape[0] == tensors[0].shape[0] for tensor in tensors)
        if not self.layers or not fits or (self.segments and self.segments.keys() != self.layers.keys()):
            raise MemoryStateError(
                "The layers of this memory disagree.", "Each needs its state, of one batch.", "Pass one batch."
            )

    def __repr__(self) -> str:
        _, heads, rank, _ = next(iter(self.layers.values())).shape
        return f"MemoryState(batch={self.batch_size}, layers={len(self.layers)}, heads={heads}, rank={rank})"

    @property
    def batch_size(self) -> int:
        return next(iter(self.layers.values())).shape[0]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.layers.values(), *self.segments.values()))

    @property
    def shape(self) -> MemoryShape:
        """`(H, R, R)` by layer, and W."""
        segment = next((segment.shape[1] for segment in self.segments.values()), 0)
        return MemoryShape({layer: tuple(state.shape[1:]) for layer, state in self.layers.items()}, segment)

    @property
    def open_tokens(self) -> Tensor:
        """int64 `[B]`: how many tokens of each conversation wait for their segment to end."""
        if not self.segments:
            return torch.zeros(self.batch_size, dtype=torch.int64)
        return next(iter(self.segments.values()))[:, -1].long()

    def norms(self) -> dict[int, Tensor]:
        """The Frobenius norm of every state, `[B, H]` by layer."""
        return {layer: state.flatten(2).norm(dim=2) for layer, state in self.layers.items()}

    def clone(self) -> MemoryState:
        """An independent copy, cut off from autograd."""
        return self._map(lambda tensor: tensor.detach().clone())

    def fork(self, copies: int) -> MemoryState:
        """Every row `copies` times, the copies of a row side by side: `[B·copies, H, R, R]`."""
        return self._map(lambda tensor: tensor.repeat_interleave(copies, dim=0))

    def select(self, rows: Tensor | Sequence[int]) -> MemoryState:
        """The given rows, in the given order, repeats allowed."""
        return self._map(lambda tensor: tensor.index_select(0, torch.as_tensor(rows, device=tensor.device)))

    @classmethod
    def stack(cls, memories: Sequence[MemoryState]) -> MemoryState:
        """All rows of all `memories` as one batch, in order.

        Raises:
            MemoryStateError: there are none, or they are not of one adapter.
        """
        if not memories:
            raise MemoryStateError("There are no memories to stack.", "", "Pass one or more.")
        first = memories[0]
        for memory in memories[1:]:
            check_memory(memory.shape, memory.adapter, first.shape, first.adapter)
        layers = {layer: torch.cat([memory.layers[layer] for memory in memories]) for layer in first.layers}
        segments = {layer: torch.cat([memory.segments[layer] for memory in memories]) for layer in first.segments}
        return cls(layers, first.adapter, segments)

    def to(self, device: torch.device | str) -> MemoryState:
        if next(iter(self.layers.values())).device == torch.device(device):
            return self
        return self._map(lambda tensor: tensor.to(device))

    def check_finite(self) -> None:
        """
        Raises:
            MemoryStateError: a state holds NaN or infinity.
        """
        for layer in self.layers:
            tensors = [part[layer] for part in (self.layers, self.segments) if part]
            if not all(bool(tensor.isfinite().all()) for tensor in tensors):
                raise MemoryStateError(
                    f"The memory of layer {layer} holds NaN or infinity.", "", "Start from an earlier one."
                )

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, whole or not at all; `load` gives the same bits back.

        Raises:
            MemoryStateError: it holds NaN or infinity.
        """
        states, segments = (
            {layer: tensor.detach().cpu().numpy() for layer, tensor in part.items()}
            for part in (self.layers, self.segments)
        )
        write_memory(path, StoredMemory(states, segments, self.adapter))

    @classmethod
    def load(cls, path: str | Path) -> MemoryState:
        """Read a memory file.

        Raises:
            MemoryStateError: the file is missing, damaged, or newer than this version.
        """
        stored = read_memory(path)
        states, segments = (
            {layer: torch.from_numpy(array) for layer, array in part.items()}
            for part in (stored.states, stored.segments)
        )
        return cls(states, stored.adapter, segments)

    def _map(self, change: Callable[[Tensor], Tensor]) -> MemoryState:
        layers, segments = (
            {layer: change(tensor) for layer, tensor in part.items()} for part in (self.layers, self.segments)
        )
        return MemoryState(layers, self.adapter, segments)


def _no_memory(what: str, tensor: Tensor, wanted: str) -> MemoryStateError:
    return MemoryStateError(
        f"The {what} is no memory.",
        f"It is {tensor.dtype} {list(tensor.shape)}, not float32 {wanted}.",
        "Pass states as a MemoryCache returns them.",
    )


class MemoryCache(DynamicCache):
    """The KV cache of a patched model together with its memory: pass it as `cache`.

    After beam search `memory` holds the states of the beams that were still running, not of the sequences returned.

    Args:
        model: a model that `attach` or `load` has given a memory.
        memory: where to start; None starts from zeros. It is not changed: read the new one from `cache.memory`.
        write: whether tokens write. A bool `[B, T]` tensor says it token by token, for one call.
        max_length: room for so many tokens, taken at once and never moved, as torch.compile likes it (transformers'
            static cache); None grows with the text.

    Where the adapter writes by segments (a message, a sentence), set `segments` before a call, as
    `deltamem.encode_chat` gives it: it says of the next tokens which segment they belong to. Tokens of which nothing is
    said join the open segment, as generated ones do. `end_segment()` writes what is open.

    Raises:
        MemoryStateError: `memory` belongs to another adapter, has other layers, heads or rank, or holds NaN.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        memory: MemoryState | None = None,
        write: bool | Tensor = True,
        max_length: int | None = None,
    ) -> None:
        super().__init__(config=model.config)
        if max_length is not None:
            self.layers = StaticCache(config=model.config, max_cache_len=max_length).layers
        adapter = patch_of(model).adapter
        self.write = write
        self.memory = memory
        # Set it to {} to have, `[B, 2]` by layer: the mean β of each write summed, and how many writes there were.
        self.openings: dict[int, Tensor] | None = None
        self.segments: Tensor | None = None  # int8 [B, tokens to come]: memory.OUTSIDE, INSIDE or LAST
        self._config: DeltaMemConfig = adapter.config
        self._device_type = model.device.type
        self._stop_tokens: Tensor | None = None
        self._step: tuple[Tensor | None] | None = None  # bool [B, T], what `generate` feeds next; None outside of it
        self._finished: Tensor | None = None  # [B] rows that `generate` goes on feeding after their end
        if memory is not None:
            check_memory(memory.shape, memory.adapter, adapter.memory_shape, adapter.fingerprint)
            memory.check_finite()

    def end_segment(self) -> None:
        """Write the open segment of every conversation that has one.

        Raises:
            MemoryStateError: every token writes by itself, or all segments are empty.
        """
        if self._config.granularity == "token":
            raise MemoryStateError(
                "This memory has no segments.", "Its adapter writes every token by itself.", "Leave end_segment() out."
            )
        if self.memory is None or not bool((self.memory.open_tokens > 0).any()):
            raise MemoryStateError(
                "The open segment is empty.", "No token has come since the last one ended.", "End it after its tokens."
            )
        layers, segments = {}, {}
        for layer, state in self.memory.layers.items():
            layers[layer], segments[layer] = end_segment(self._config, state, self.memory.segments[layer])
        self.memory = MemoryState(layers, self.memory.adapter, segments)

    def begin_generation(self, stop_tokens: Tensor | None) -> None:
        """`generate` starts: rows that produce one of `stop_tokens` will no longer read or write."""
        self._finished, self._step, self._stop_tokens = None, None, stop_tokens

    def begin_step(self, produced: Tensor | None, valid: Tensor | None) -> None:
        """`generate` feeds tokens that it has `produced` `[B, T]` next, which can end a row, or else (None) the prompt.

        `valid`, bool `[B, T]`, says which tokens are no padding; None for all.
        """
        if produced is not None and self._stop_tokens is not None:
            ended = torch.isin(produced, self._stop_tokens.to(produced.device)).any(dim=1)
            self._finished = ended if self._finished is None else self._finished | ended
            unfinished = ~self._finished[:, None].expand(produced.shape)
            valid = unfinished if valid is None else valid & unfinished
        self._step = (valid,)

    def take_step(self) -> tuple[Tensor | None] | None:
        """Which tokens of the call that `generate` has announced still belong to the conversation, bool `[B, T]`, or
        None for all; in a tuple, which is None where nothing was announced."""
        step, self._step = self._step, None
        return step

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._take_keys(beam_idx.long())
        self._take(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.reorder_cache(indices)  # all that static layers can do

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.get_seq_length() > 0:  # empty layers have no rows to repeat
            keys = next(keys for layer in self.layers if (keys := getattr(layer, "keys", None)) is not None)
            self._take_keys(torch.arange(len(keys)).repeat_interleave(repeats))
        if self.memory is not None:
            self.memory = self.memory.fork(repeats)
        if self.segments is not None:
            self.segments = self.segments.repeat_interleave(repeats, dim=0)

    def reset(self) -> None:
        super().reset()
        self.memory, self.segments, self._finished, self._step = None, None, None, None

    @property
    def is_compileable(self) -> bool:
        """Whether `generate` compiles decode steps by itself. Not on a GPU, where it would record them as CUDA graphs,
        which keep their outputs in one place: a memory taken from `cache.memory` would change at the next step."""
        return super().is_compileable and self._device_type != "cuda"

    @property
    def is_croppable(self) -> bool:
        return False

    def crop(self, tokens_to_remove: int) -> None:
        raise MemoryStateError(
            "A memory cannot forget its last tokens.",
            "What a token wrote is mixed into the state; assisted and speculative decoding need to take tokens back.",
            "Decode without an assistant, or keep `cache.memory` from before and start from it.",
        )

    def _take_keys(self, rows: Tensor) -> None:
        super().reorder_cache(rows)  # type: ignore[arg-type]  # LongTensor is a type of its own to mypy

    def _take(self, rows: Tensor) -> None:
        if self.memory is not None:
            self.memory = self.memory.select(rows)
        if self.segments is not None:
            self.segments = self.segments.index_select(0, rows.to(self.segments.device))
        if self._finished is not None:
            self._finished = self._finished.index_select(0, rows.to(self._finished.device))

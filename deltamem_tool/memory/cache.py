"""The KV cache of a model together with its memory: what carries a memory through `generate()`."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

from deltamem_tool.config import DeltaMemConfig
from deltamem_tool.errors import MemoryStateError
from deltamem_tool.memory.attached import patch_of
from deltamem_tool.memory.file import check_memory
from deltamem_tool.memory.layer import end_segment
from deltamem_tool.memory.state import MemoryState


class MemoryCache(DynamicCache):
    """The KV cache of a patched model together with its memory: pass it as `cache`.

    After beam search `memory` holds the states of the beams that were still running, not of the sequences returned.

    Args:
        model: a model that `attach` or `load` has given a memory.
        memory: where to start; None starts from zeros. It is not changed: read the new one from `cache.memory`.
        write: whether tokens write. A bool `[B, T]` tensor says it token by token, for one call.
        max_length: room for so many tokens, taken at once and never moved, as torch.compile likes it (transformers'
            static cache); None grows with the text.

    Where the adapter writes by segments (a message, a sentence), set `segment_tags` before a call, as
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
        self.write_gates: dict[int, Tensor] | None = None
        self.segment_tags: Tensor | None = None  # int8 [B, tokens to come]: see `SegmentTag`
        self._config: DeltaMemConfig = adapter.config
        self._device_type = model.device.type
        self._stop_tokens: Tensor | None = None
        self._step: tuple[Tensor | None] | None = None  # bool [B, T], what `generate` feeds next; None outside of it
        self._finished: Tensor | None = None  # [B] rows that `generate` goes on feeding after their end
        if memory is not None:
            check_memory(memory.shape, memory.adapter, adapter.memory_shape, adapter.fingerprint)
            memory.check_finite()

    @property
    def segments(self) -> Tensor | None:
        """What `segment_tags` was called in 0.1."""
        return self.segment_tags

    @segments.setter
    def segments(self, segment_tags: Tensor | None) -> None:
        self.segment_tags = segment_tags

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
            layers[layer], segments[layer] = end_segment(self._config, state, self.memory.open_segments[layer])
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
        if self.segment_tags is not None:
            self.segment_tags = self.segment_tags.repeat_interleave(repeats, dim=0)

    def reset(self) -> None:
        super().reset()
        self.memory, self.segment_tags, self._finished, self._step = None, None, None, None

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
        if self.segment_tags is not None:
            self.segment_tags = self.segment_tags.index_select(0, rows.to(self.segment_tags.device))
        if self._finished is not None:
            self._finished = self._finished.index_select(0, rows.to(self._finished.device))

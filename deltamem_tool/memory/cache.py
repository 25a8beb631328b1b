"""The KV cache of a model together with its memory, to carry the memory through `generate()`."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

from deltamem_tool._compat import DynamicLayer, StaticLayer
from deltamem_tool.base_model.placement import input_device
from deltamem_tool.config import DeltaMemConfig
from deltamem_tool.errors import MemoryStateError
from deltamem_tool.memory.attachment import attachment_of
from deltamem_tool.memory.file import check_memory
from deltamem_tool.memory.layer import end_segment
from deltamem_tool.memory.state import MemoryState


class MemoryCache(DynamicCache):
    """The KV cache of a model together with its memory: pass it to the model as `cache`.

    If the adapter writes by segments (messages or sentences), set `segment_tags` before a call to the tags that
    `deltamem.encode_chat` returns. They say which segment the next tokens belong to. Without them, tokens join the open
    segment, as generated tokens do. `end_segment()` writes the open segment.

    After beam search, `memory` holds the states of the beams that were still running, not those of the returned
    sequences.

    Args:
        model: a model with a memory, from `attach` or `load`.
        memory: memory to start from; None starts from zeros. It is not changed: the new memory is `cache.memory`.
        write: whether tokens write. A bool `[B, T]` tensor is a mask over the tokens of one call.
        max_length: allocate transformers' static cache with room for this many tokens, as torch.compile needs. With
            None, the cache grows with the text.

    Raises:
        MemoryStateError: `memory` belongs to another adapter, has other layers, heads or rank, or contains NaN.

    Example:
        >>> import deltamem_tool as deltamem
        >>> from transformers import AutoTokenizer
        >>> model = deltamem.load("builtin:adapter")
        >>> tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
        >>> inputs = tokenizer("My dog is Rex.", return_tensors="pt")
        >>> cache = deltamem.MemoryCache(model)
        >>> _ = model.generate(**inputs, cache=cache, max_new_tokens=4)
        >>> cache.memory
        MemoryState(batch=1, layers=4, heads=4, rank=8)
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
        adapter = attachment_of(model).adapter
        self.write = write
        self.memory = memory
        # Set it to {} to have, `[B, 2]` by layer: the mean β of each write summed, and how many writes there were.
        self.write_gates: dict[int, Tensor] | None = None
        self.segment_tags: Tensor | None = None  # int8 [B, tokens to come]: see `SegmentTag`
        self._config: DeltaMemConfig = adapter.config
        self._device_type = input_device(model).type
        self._window: int | None = getattr(model.config.get_text_config(decoder=True), "sliding_window", None)
        self._fed = 0  # tokens, counted without a look at the device
        # Of the running `generate`, until it feeds its prompt.
        self._max_length: int | None = None
        self._copies = 1
        self._step: tuple[Tensor | None] | None = None  # bool [B, T], what `generate` feeds next; None outside of it
        self._finished: Tensor | None = None  # [B] bool, rows that `generate` goes on feeding after their end
        if memory is not None:
            check_memory(memory.shape, memory.adapter, adapter.memory_shape, adapter.fingerprint)
            memory.check_finite()

    @property
    def segments(self) -> Tensor | None:
        """The old name of `segment_tags`, from version 0.1."""
        return self.segment_tags

    @segments.setter
    def segments(self, segment_tags: Tensor | None) -> None:
        self.segment_tags = segment_tags

    def end_segment(self) -> None:
        """Write the open segment of every conversation that has one.

        Raises:
            MemoryStateError: the adapter writes every token separately, or all open segments are empty.
        """
        if self._config.granularity == "token":
            raise MemoryStateError(
                "This memory has no segments.", "Its adapter writes at every token.", "Do not call end_segment()."
            )
        if self.memory is None or not bool((self.memory.open_tokens > 0).any()):
            raise MemoryStateError(
                "The open segment is empty.",
                "No token has been processed since the last segment ended.",
                "Call end_segment() after the segment's tokens.",
            )
        layers, segments = {}, {}
        for layer, state in self.memory.layers.items():
            layers[layer], segments[layer] = end_segment(self._config, state, self.memory.open_segments[layer])
        self.memory = MemoryState(layers, self.memory.adapter, segments)

    def begin_generation(self, max_length: int | None, copies: int) -> None:
        """Record that `generate` starts and that no row has ended.

        Args:
            max_length: the `max_length` of `generate`, for prompt and answer; None if it feeds the prompt in pieces.
            copies: number of copies of each row that it feeds.
        """
        self._finished, self._step, self._max_length, self._copies = None, None, max_length, copies

    def finish(self, done: Tensor) -> None:
        """Record the rows that a stopping criterion of `generate` has ended. They no longer read or write.

        Args:
            done: bool `[B]`.
        """
        self._finished = done if self._finished is None else self._finished | done

    def begin_step(self, content: Tensor, valid: Tensor | None, given: int = 0) -> None:
        """Record the tokens that `generate` feeds next.

        Args:
            content: token ids `[B, T]` or embeddings `[B, T, D]`.
            valid: bool `[B, T]`, the tokens that are not padding; None for all.
            given: number of tokens in the prompt, including those already in the cache.

        Raises:
            MemoryStateError: there is no room for an answer of the maximum length.
        """
        if self._max_length is not None:
            self.check_room(content.shape[1] + self._max_length - given - 1)  # the last one is not fed
            self._max_length = None
        if self._copies > 1:
            self.batch_repeat_interleave(self._copies)
            self._copies = 1
        if self._finished is not None:
            unfinished = ~self._finished.to(content.device)[:, None].expand(content.shape[:2])
            valid = unfinished if valid is None else valid & unfinished
        self._step = (valid,)

    @property
    def length(self) -> int:
        """Number of tokens in the layers that keep all of them, without waiting for a GPU; 0 if no layer does."""
        layers = (
            layer
            for layer in cast(list[Any], self.layers)
            if type(layer) is DynamicLayer or isinstance(layer, StaticLayer)
        )
        length = next((layer.get_seq_length() for layer in layers), 0)
        return self._fed if isinstance(length, Tensor) and length.device.type != "cpu" else int(length)

    def drop_after(self, length: int) -> None:
        """Remove what a failed call has left in its first layers, if these keep all keys and values."""
        for number, layer in enumerate(cast(list[Any], self.layers)):
            if type(layer) is DynamicLayer and layer.get_seq_length() > length:
                if length == 0:
                    self.layers[number] = DynamicLayer()
                else:
                    layer.keys, layer.values = layer.keys[:, :, :length], layer.values[:, :, :length]
            elif type(layer) is StaticLayer and layer.is_initialized and self._device_type == "cpu":
                layer.cumulative_length.fill_(length)  # elsewhere what a compiled graph has fed was not counted

    def check_room(self, tokens: int) -> None:
        """Check that the static layers have room for this many more tokens. Other layers grow, or keep a window.

        Raises:
            MemoryStateError: there is not enough room.
        """
        rooms = [
            layer.max_cache_len
            for layer in self.layers
            if isinstance(layer, StaticLayer)
            and not (layer.is_sliding and layer.max_cache_len >= (self._window or 0))  # a whole window lasts forever
        ]
        if not rooms:
            return
        if self.length + tokens > min(rooms):
            raise MemoryStateError(
                f"This static cache has no room for {tokens} more tokens.",
                f"It holds at most {min(rooms)}, and {self.length} are in it.",
                "Create it with a larger max_length, or without max_length, so that it grows.",
            )

    def count(self, tokens: int) -> None:
        """Record that this many more tokens are in the cache."""
        self._fed += tokens

    def take_step(self) -> tuple[Tensor | None] | None:
        """Return the mask of the tokens recorded by `begin_step`, and clear it.

        The mask is bool `[B, T]`, or None for all tokens, in a tuple. None instead of a tuple means that nothing was
        recorded.
        """
        step, self._step = self._step, None
        return step

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Select the rows `beam_idx` of keys and values, memory and segment tags."""
        self._take_keys(beam_idx.long())
        if self.memory is not None:
            self.memory = self.memory.select(beam_idx)
        if self.segment_tags is not None:
            self.segment_tags = self.segment_tags.index_select(0, beam_idx.to(self.segment_tags.device))
        if self._finished is not None:
            self._finished = self._finished.index_select(0, beam_idx.to(self._finished.device))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Select the rows `indices`, as `reorder_cache` does."""
        self.reorder_cache(indices)  # all that static layers can do

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row; the copies of a row are adjacent."""
        if self.get_seq_length() > 0:  # empty layers have no rows to repeat
            keys = next(keys for layer in self.layers if (keys := getattr(layer, "keys", None)) is not None)
            self._take_keys(torch.arange(len(keys)).repeat_interleave(repeats))
        if self.memory is not None:
            self.memory = self.memory.fork(repeats)
        if self.segment_tags is not None:
            self.segment_tags = self.segment_tags.repeat_interleave(repeats, dim=0)

    def reset(self) -> None:
        """Clear the cache, including the memory."""
        super().reset()  # type: ignore[no-untyped-call]  # of transformers
        self.memory, self.segment_tags, self._finished, self._step, self._fed = None, None, None, None, 0

    @property
    def is_compileable(self) -> bool:
        """Whether `generate` compiles decode steps automatically.

        It does not on a GPU. There it would record them as CUDA graphs, which reuse their output buffers, so that a
        memory taken from `cache.memory` would change at the next step.
        """
        return super().is_compileable and self._device_type != "cuda"

    @property
    def is_croppable(self) -> bool:
        """Always False: a memory cannot forget tokens."""
        return False

    def crop(self, tokens_to_remove: int) -> None:
        """Always raise MemoryStateError: a memory cannot forget tokens."""
        raise token_removal_error()

    def _take_keys(self, rows: Tensor) -> None:
        super().reorder_cache(rows)  # type: ignore[arg-type]  # LongTensor is a type of its own to mypy


def token_removal_error() -> MemoryStateError:
    """Return the error for decoding methods that feed tokens and then discard them."""
    return MemoryStateError(
        "A memory cannot forget its last tokens.",
        "A write to the state cannot be undone; assisted and speculative decoding need to take tokens back.",
        "Decode without an assistant, or keep `cache.memory` from before and start from it.",
    )

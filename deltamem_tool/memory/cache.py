"""The KV cache of a model together with its memory: what carries a memory through `generate()`."""

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

    After beam search `memory` holds the states of the beams that were still running, not of the sequences returned.

    Args:
        model: a model that `attach` or `load` has given a memory.
        memory: the memory to start from; None starts from zeros. It is not changed: the new one is `cache.memory`.
        write: whether tokens write. A bool `[B, T]` tensor is a mask over the tokens of one call.
        max_length: allocate transformers' static cache, of this many tokens, which torch.compile needs; None grows with
            the text.

    Where the adapter writes by segments (a message, a sentence), set `segment_tags` before a call, to what
    `deltamem.encode_chat` returns: it says which segment the next tokens belong to. Without it tokens join the open
    segment, as generated ones do. `end_segment()` writes the open segment.

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
        """What `segment_tags` was called in 0.1."""
        return self.segment_tags

    @segments.setter
    def segments(self, segment_tags: Tensor | None) -> None:
        self.segment_tags = segment_tags

    def end_segment(self) -> None:
        """Write the open segment of every conversation that has one.

        Raises:
            MemoryStateError: the adapter writes every token by itself, or all open segments are empty.
        """
        if self._config.granularity == "token":
            raise MemoryStateError(
                "This memory has no segments.", "Its adapter writes every token by itself.", "Leave end_segment() out."
            )
        if self.memory is None or not bool((self.memory.open_tokens > 0).any()):
            raise MemoryStateError(
                "The open segment is empty.",
                "No token was fed since the last segment ended.",
                "Call end_segment() after the segment's tokens.",
            )
        layers, segments = {}, {}
        for layer, state in self.memory.layers.items():
            layers[layer], segments[layer] = end_segment(self._config, state, self.memory.open_segments[layer])
        self.memory = MemoryState(layers, self.memory.adapter, segments)

    def begin_generation(self, max_length: int | None, copies: int) -> None:
        """Note that `generate` starts: no row has ended.

        Args:
            max_length: its `max_length`, of prompt and answer; None if it feeds the prompt in pieces.
            copies: how many of each row it will feed.
        """
        self._finished, self._step, self._max_length, self._copies = None, None, max_length, copies

    def finish(self, done: Tensor) -> None:
        """Note which rows a stopping criterion of `generate` has ended: they will no longer read or write.

        Args:
            done: bool `[B]`.
        """
        self._finished = done if self._finished is None else self._finished | done

    def begin_step(self, content: Tensor, valid: Tensor | None, given: int = 0) -> None:
        """Note what `generate` feeds next.

        Args:
            content: token ids `[B, T]` or embeddings `[B, T, D]`.
            valid: bool `[B, T]`, tokens that are not padding; None for all.
            given: tokens of the prompt, those that the cache holds already included.

        Raises:
            MemoryStateError: there is no room for the longest answer.
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
        """How many tokens the layers hold that keep them all, without waiting for a GPU; 0 if none does."""
        layers = (
            layer
            for layer in cast(list[Any], self.layers)
            if type(layer) is DynamicLayer or isinstance(layer, StaticLayer)
        )
        length = next((layer.get_seq_length() for layer in layers), 0)
        return self._fed if isinstance(length, Tensor) and length.device.type != "cpu" else int(length)

    def drop_after(self, length: int) -> None:
        """Take back what a call that failed has left in its first layers, where they keep all keys and values."""
        for number, layer in enumerate(cast(list[Any], self.layers)):
            if type(layer) is DynamicLayer and layer.get_seq_length() > length:
                if length == 0:
                    self.layers[number] = DynamicLayer()
                else:
                    layer.keys, layer.values = layer.keys[:, :, :length], layer.values[:, :, :length]
            elif type(layer) is StaticLayer and layer.is_initialized and self._device_type == "cpu":
                layer.cumulative_length.fill_(length)  # elsewhere what a compiled graph has fed was not counted

    def check_room(self, tokens: int) -> None:
        """Check that the static layers have room for so many more tokens; others grow, or keep a window.

        Raises:
            MemoryStateError: they do not.
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
                f"It is for {min(rooms)}, and {self.length} are in it.",
                "Make it with a larger max_length, or without one: then it grows.",
            )

    def count(self, tokens: int) -> None:
        """Note that so many tokens are in the cache now."""
        self._fed += tokens

    def take_step(self) -> tuple[Tensor | None] | None:
        """Return which tokens of the call that `begin_step` has announced belong to the conversation.

        They are bool `[B, T]`, or None for all, in a tuple; None where nothing was announced.
        """
        step, self._step = self._step, None
        return step

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the rows `beam_idx`, of keys and values, memory and segment tags."""
        self._take_keys(beam_idx.long())
        if self.memory is not None:
            self.memory = self.memory.select(beam_idx)
        if self.segment_tags is not None:
            self.segment_tags = self.segment_tags.index_select(0, beam_idx.to(self.segment_tags.device))
        if self._finished is not None:
            self._finished = self._finished.index_select(0, beam_idx.to(self._finished.device))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Take the rows `indices`."""
        self.reorder_cache(indices)  # all that static layers can do

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row, the copies of a row side by side."""
        if self.get_seq_length() > 0:  # empty layers have no rows to repeat
            keys = next(keys for layer in self.layers if (keys := getattr(layer, "keys", None)) is not None)
            self._take_keys(torch.arange(len(keys)).repeat_interleave(repeats))
        if self.memory is not None:
            self.memory = self.memory.fork(repeats)
        if self.segment_tags is not None:
            self.segment_tags = self.segment_tags.repeat_interleave(repeats, dim=0)

    def reset(self) -> None:
        """Forget everything, the memory too."""
        super().reset()  # type: ignore[no-untyped-call]  # of transformers
        self.memory, self.segment_tags, self._finished, self._step, self._fed = None, None, None, None, 0

    @property
    def is_compileable(self) -> bool:
        """Whether `generate` compiles decode steps by itself.

        Not on a GPU, where it would record them as CUDA graphs, which keep their outputs in one place: a memory taken
        from `cache.memory` would change at the next step.
        """
        return super().is_compileable and self._device_type != "cuda"

    @property
    def is_croppable(self) -> bool:
        """False: a memory cannot forget tokens."""
        return False

    def crop(self, tokens_to_remove: int) -> None:
        """Raise MemoryStateError: a memory cannot forget tokens."""
        raise takes_tokens_back()

    def _take_keys(self, rows: Tensor) -> None:
        super().reorder_cache(rows)  # type: ignore[arg-type]  # LongTensor is a type of its own to mypy


def takes_tokens_back() -> MemoryStateError:
    """The error for what feeds tokens that it does not keep."""
    return MemoryStateError(
        "A memory cannot forget its last tokens.",
        "What a token wrote is mixed into the state; assisted and speculative decoding need to take tokens back.",
        "Decode without an assistant, or keep `cache.memory` from before and start from it.",
    )

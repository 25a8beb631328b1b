"""The engine that runs conversations in PyTorch, as `onnx.runtime` does in ONNX Runtime."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deltamem_tool._compat import (
    DummyLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
)
from deltamem_tool.base_model.placement import input_device
from deltamem_tool.chat.engine import check_ids
from deltamem_tool.chat.group import Group, PaddedGroup
from deltamem_tool.chat.text import ChatText
from deltamem_tool.chat.torch_states import (
    States,
    concatenate_states,
    fill_states,
    select_states,
    states_of,
    without_window,
)
from deltamem_tool.errors import ArchitectureError
from deltamem_tool.memory.attachment import attachment_of
from deltamem_tool.memory.cache import MemoryCache
from deltamem_tool.memory.call_options import CallOptions, fill_layer
from deltamem_tool.memory.file import StoredMemory
from deltamem_tool.memory.state import MemoryState
from deltamem_tool.segments.tags import SegmentTag

# Layers of the cache: those that keep keys and values, or nothing, and all whose rows can be told apart.
_KEYS_ALONE = (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer)
_SEPARABLE = (DynamicLayer, DummyLayer, LinearAttentionLayer, LinearAttentionAndFullAttentionLayer)


@dataclass(frozen=True)
class TorchPast:
    """The past of one or more conversations.

    Args:
        layers: keys and values `[B, heads, P, width]` by decoder layer.
        memory: the memory.
        states: states of convolutions and of linear attention `[B, …]` by decoder layer, see `torch_states`.
        others: cache layers that keep something else.
    """

    layers: Mapping[int, tuple[Tensor, Tensor]]
    memory: MemoryState
    states: Mapping[int, States] = field(default_factory=dict)
    others: Mapping[int, Any] = field(default_factory=dict)


class TorchModel:
    """A model with a memory that runs in PyTorch: pass it to `Conversation`.

    One instance serves many conversations and threads.

    Args:
        model: a model as returned by `deltamem.load`, in eval mode.
        tokenizer: its tokenizer, which must be a fast one.

    Raises:
        ArchitectureError: the model has no memory.
        DataError: the tokenizer is not a fast one.

    Example:
        >>> import deltamem_tool as deltamem
        >>> from transformers import AutoTokenizer
        >>> model = deltamem.load("builtin:adapter")
        >>> engine = deltamem.TorchModel(model, AutoTokenizer.from_pretrained(model.name_or_path))
        >>> deltamem.Conversation(engine).memory.states[0].shape  # of layer 0
        (1, 4, 8, 8)
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        adapter = attachment_of(model).adapter
        self.model = model
        self.text = ChatText.from_tokenizer(tokenizer)
        self.stop_tokens = stop_tokens(model, self.text)
        self.adapter: str = adapter.fingerprint
        self.mechanism = adapter.config
        self.memory_shape = adapter.memory_shape
        self._last, self._all = CallOptions(model, "last"), CallOptions(model, "all")
        self.max_length = self._last.positions
        self._vocabulary: int = cast(Any, model.get_input_embeddings()).weight.shape[0]
        self.takes_back = all(type(layer) in _KEYS_ALONE for layer in MemoryCache(model).layers)

    def start(self, memory: StoredMemory) -> TorchPast:
        """See `Engine.start`."""
        return TorchPast({}, self._on_devices(memory))

    def step(
        self,
        past: TorchPast,
        input_ids: NDArray[Any],
        attention_mask: NDArray[Any],
        write_mask: NDArray[Any],
        segment_end: NDArray[Any] | None = None,
        all_positions: bool = False,
    ) -> tuple[NDArray[Any], TorchPast]:
        """See `Engine.step`."""
        check_ids(self.text, input_ids, self._vocabulary)
        mask, length = attention_mask.astype(bool), attention_mask.shape[1]
        valid = mask[:, length - input_ids.shape[1] :]
        if self.takes_back or valid.all():
            return self._call(past, input_ids, attention_mask, write_mask, segment_end, all_positions)
        # States change at padding, but where it is on the left of everything: each row goes by itself, without any.
        pasts, logits_of_rows = [], []
        for row, (columns, new) in enumerate(zip(mask, valid, strict=True)):
            alone = self.take(past, row, np.flatnonzero(columns[: length - len(new)]))
            if new.any():
                ids, write = input_ids[row : row + 1, new], write_mask[row : row + 1, new]
                end = None if segment_end is None else segment_end[row : row + 1, new]
                ones = np.ones((1, int(columns.sum())), np.int64)
                logits, alone = self._call(alone, ids, ones, write, end, all_positions=True)
                logits_of_rows.append(logits[0])
            pasts.append(_scatter(alone, np.flatnonzero(columns), length))
        logits = np.zeros((*valid.shape, logits_of_rows[0].shape[-1]), np.float32)
        logits[valid] = np.concatenate(logits_of_rows)
        last = [int(new[-1]) if len(new) else 0 for new in map(np.flatnonzero, valid)]
        return (logits if all_positions else logits[np.arange(len(last)), last]), self.join(pasts)

    @torch.no_grad()
    def _call(
        self,
        past: TorchPast,
        input_ids: NDArray[Any],
        attention_mask: NDArray[Any],
        write_mask: NDArray[Any],
        segment_end: NDArray[Any] | None,
        all_positions: bool,
    ) -> tuple[NDArray[Any], TorchPast]:
        """Call the model once."""
        device = input_device(self.model)
        ids, mask, write = (torch.from_numpy(array).to(device) for array in (input_ids, attention_mask, write_mask))
        cache = MemoryCache(self.model, past.memory, write)
        # Layers with a window keep everything, too, and their mask hides it: else nothing could be cut off again. Not
        # beside layers that cannot: one mask may be that of them all.
        layers = [without_window(layer) for layer in cache.layers]
        if all(type(layer) in _SEPARABLE for layer in layers):
            cache.layers = layers
        for index, other in past.others.items():
            cache.layers[index] = copy.deepcopy(other)
        for index, (keys, values) in past.layers.items():
            fill_layer(cast(DynamicLayer, cache.layers[index]), keys, values)
        for index, states in past.states.items():
            fill_states(cache.layers[index], states)
        if segment_end is not None:
            tags = np.where(write_mask, np.where(segment_end, SegmentTag.LAST, SegmentTag.INSIDE), SegmentTag.OUTSIDE)
            cache.segment_tags = torch.from_numpy(tags).to(device, torch.int8)
        logits = (self._all if all_positions else self._last).logits(self.model, ids, mask, cache)
        assert cache.memory is not None
        return (logits if all_positions else logits[:, -1]).float().cpu().numpy(), _past_of(cache, cache.memory)

    def memory(self, past: TorchPast) -> StoredMemory:
        """See `Engine.memory`."""
        states, segments = (
            {layer: tensor.detach().cpu().numpy().copy() for layer, tensor in part.items()}
            for part in (past.memory.layers, past.memory.open_segments)
        )
        return StoredMemory(states, segments, self.adapter)

    def with_memory(self, past: TorchPast, memory: StoredMemory) -> TorchPast:
        """See `Engine.with_memory`."""
        return replace(past, memory=self._on_devices(memory))

    def take(self, past: TorchPast, row: int, columns: NDArray[Any]) -> TorchPast:
        """See `Engine.take`."""
        _check_separable(past)
        index_tensor = torch.from_numpy(columns)
        layers = {}
        for index, (keys, values) in past.layers.items():
            index_tensor = index_tensor.to(keys.device)  # one copy for all layers that are there
            layers[index] = (
                keys[row : row + 1].index_select(2, index_tensor),
                values[row : row + 1].index_select(2, index_tensor),
            )
        states = select_states(past.states, [row])
        return TorchPast(layers if len(columns) else {}, past.memory.select([row]), states if len(columns) else {})

    def keep(self, past: TorchPast, columns: Mapping[int, NDArray[Any]]) -> TorchPast:
        """See `Engine.keep`. One copy a layer: with one a row, a large batch would wait for thousands of small ones."""
        _check_separable(past)
        rows, first = [*columns], int(min(of_row[0] for of_row in columns.values()))
        index_tensor, layers = torch.tensor(rows), {}
        for index, (keys, values) in past.layers.items():
            index_tensor = index_tensor.to(keys.device)
            layers[index] = (
                keys[:, :, first:].index_select(0, index_tensor),
                values[:, :, first:].index_select(0, index_tensor),
            )
        return TorchPast(layers, past.memory.select(rows), select_states(past.states, rows))

    def join(self, pasts: Sequence[TorchPast]) -> TorchPast:
        """See `Engine.join`."""
        if len(pasts) == 1:
            return pasts[0]
        for past in pasts:
            _check_separable(past)
        shapes = next((past.layers for past in pasts if past.layers), {})
        layers = {}
        for index, examples in shapes.items():
            empty = [example[:1, :, :0] for example in examples]
            parts = [
                past.layers.get(index) or tuple(x.expand(past.memory.batch_size, -1, -1, -1) for x in empty)
                for past in pasts
            ]
            length = max(keys.shape[2] for keys, _ in parts)
            padded = (
                torch.cat([torch.nn.functional.pad(p[i], (0, 0, length - p[i].shape[2], 0)) for p in parts])
                for i in range(2)
            )
            layers[index] = cast(tuple[Tensor, Tensor], tuple(padded))
        states = concatenate_states([(past.memory.batch_size, past.states) for past in pasts])
        return TorchPast(layers, MemoryState.stack([past.memory for past in pasts]), states)

    def size(self, past: TorchPast) -> int:
        """See `Engine.size`."""
        tensors = [tensor for pair in past.layers.values() for tensor in pair]
        tensors += [tensor for states in past.states.values() for tensor in states.values()]
        tensors += [*past.memory.layers.values(), *past.memory.open_segments.values()]
        return sum(tensor.nbytes for tensor in tensors)

    def group(self) -> Group:
        """See `Engine.group`."""
        return PaddedGroup(self)

    def _on_devices(self, memory: StoredMemory) -> MemoryState:
        adapter = attachment_of(self.model).adapter
        states, segments = (
            {layer: torch.tensor(array, device=adapter.device_of(layer)) for layer, array in part.items()}
            for part in (memory.states, memory.open_segments)
        )
        return MemoryState(states, memory.adapter, segments)


def stop_tokens(model: PreTrainedModel, text: ChatText) -> frozenset[int]:
    """Ids that end an answer of `model`."""
    return text.stop_tokens(getattr(model.generation_config, "eos_token_id", None))


def _past_of(cache: MemoryCache, memory: MemoryState) -> TorchPast:
    """Return the tensors that the layers of `cache` keep."""
    layers, states, others = {}, {}, {}
    for index, layer in enumerate(cast(list[Any], cache.layers)):
        if type(layer) not in _SEPARABLE:
            others[index] = layer
            continue
        if isinstance(layer, LinearAttentionLayer):
            states[index] = states_of(layer)
        if getattr(layer, "keys", None) is not None:
            layers[index] = (layer.keys, layer.values)
    return TorchPast(layers, memory, states, others)


def _scatter(past: TorchPast, columns: NDArray[Any], length: int) -> TorchPast:
    """A past of one row whose keys and values are at `columns` of so many; zeros elsewhere."""
    layers = {}
    for index, parts in past.layers.items():
        spread = [part.new_zeros(*part.shape[:2], length, part.shape[3]) for part in parts]
        for whole, part in zip(spread, parts, strict=True):
            whole[:, :, torch.from_numpy(columns)] = part
        layers[index] = (spread[0], spread[1])
    return replace(past, layers=layers)


def _check_separable(past: TorchPast) -> None:
    """Raise for a past that cannot be cut or joined: that of layers that keep what is not known here."""
    if past.others:
        raise ArchitectureError(
            "This past cannot be split into rows and columns.",
            f"Layer {min(past.others)} keeps more than keys and values.",
            "Feed each conversation alone, from its beginning.",
        )

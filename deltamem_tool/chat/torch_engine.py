"""Run a model with a memory in PyTorch: the engine for conversations that `onnx.runtime` is in ONNX Runtime."""

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

from deltamem_tool._compat import DynamicLayer, DynamicSlidingWindowLayer
from deltamem_tool.chat.engine import check_ids
from deltamem_tool.chat.text import ChatText
from deltamem_tool.errors import ArchitectureError
from deltamem_tool.memory.attachment import attachment_of, hf_model
from deltamem_tool.memory.cache import MemoryCache
from deltamem_tool.memory.call_options import CallOptions, fill
from deltamem_tool.memory.file import StoredMemory
from deltamem_tool.memory.state import MemoryState
from deltamem_tool.segments.tags import SegmentTag


@dataclass(frozen=True)
class TorchPast:
    """Keys and values `[B, heads, P, width]` by decoder layer, the memory, and what other layers keep."""

    layers: Mapping[int, tuple[Tensor, Tensor]]
    memory: MemoryState
    others: Mapping[int, Any] = field(default_factory=dict)


class TorchModel:
    """A model with a memory, ready to talk: pass it to `Conversation`. One serves many conversations and threads.

    Args:
        model: as `deltamem.load` gives it, in eval mode.
        tokenizer: its tokenizer, a fast one.
        takes_back: whether tokens may be taken out of a past again, as a conversation needs it. Layers that keep more
            than keys and values cannot do that.

    Raises:
        ArchitectureError: the model has no memory, or its layers keep something other than keys and values.
        DataError: the tokenizer is a slow one.

    Example:
        >>> import deltamem_tool as deltamem
        >>> from transformers import AutoTokenizer
        >>> model = deltamem.load("builtin:adapter")
        >>> engine = deltamem.TorchModel(model, AutoTokenizer.from_pretrained(model.name_or_path))
        >>> deltamem.Conversation(engine).memory.states[0].shape  # of layer 0
        (1, 4, 8, 8)
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, takes_back: bool = True) -> None:
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
        for layer in MemoryCache(model).layers if takes_back else ():
            if not _keeps_keys_and_values(layer):
                raise ArchitectureError(
                    f"{type(hf_model(model)).__name__} cannot hold a conversation yet.",
                    f"Its layers keep more than keys and values ({type(layer).__name__}), which cannot be taken back.",
                    "Use `generate` with a MemoryCache.",
                )

    def start(self, memory: StoredMemory) -> TorchPast:
        """See `Engine.start`."""
        return TorchPast({}, self._on_device(memory))

    @torch.no_grad()
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
        device = self.model.device
        ids, mask, write = (torch.from_numpy(array).to(device) for array in (input_ids, attention_mask, write_mask))
        cache = MemoryCache(self.model, past.memory, write)
        # Layers with a window keep everything, too, and their mask hides it: else nothing could be cut off again.
        cache.layers = [DynamicLayer() if _keeps_keys_and_values(layer) else layer for layer in cache.layers]
        for index, other in past.others.items():
            cache.layers[index] = copy.deepcopy(other)
        for index, (keys, values) in past.layers.items():
            fill(cast(DynamicLayer, cache.layers[index]), keys, values)
        if segment_end is not None:
            tags = np.where(write_mask, np.where(segment_end, SegmentTag.LAST, SegmentTag.INSIDE), SegmentTag.OUTSIDE)
            cache.segment_tags = torch.from_numpy(tags).to(device, torch.int8)
        logits = (self._all if all_positions else self._last).logits(self.model, ids, mask, cache)
        others = {index: layer for index, layer in enumerate(cache.layers) if type(layer) is not DynamicLayer}
        layers = {
            index: (layer.keys, layer.values)
            for index, layer in enumerate(cast(list[DynamicLayer], cache.layers))
            if index not in others and layer.keys is not None and layer.values is not None
        }
        assert cache.memory is not None
        return (logits if all_positions else logits[:, -1]).float().cpu().numpy(), TorchPast(
            layers, cache.memory, others
        )

    def memory(self, past: TorchPast) -> StoredMemory:
        """See `Engine.memory`."""
        states, segments = (
            {layer: tensor.detach().cpu().numpy().copy() for layer, tensor in part.items()}
            for part in (past.memory.layers, past.memory.open_segments)
        )
        return StoredMemory(states, segments, self.adapter)

    def with_memory(self, past: TorchPast, memory: StoredMemory) -> TorchPast:
        """See `Engine.with_memory`."""
        return replace(past, memory=self._on_device(memory))

    def take(self, past: TorchPast, row: int, columns: NDArray[Any]) -> TorchPast:
        """See `Engine.take`."""
        _check_separable(past)
        kept = torch.from_numpy(columns).to(self.model.device)
        layers = {
            index: (keys[row : row + 1].index_select(2, kept), values[row : row + 1].index_select(2, kept))
            for index, (keys, values) in past.layers.items()
        }
        return TorchPast(layers if len(columns) else {}, past.memory.select([row]))

    def join(self, pasts: Sequence[TorchPast]) -> TorchPast:
        """See `Engine.join`."""
        if len(pasts) == 1:
            return pasts[0]
        for past in pasts:
            _check_separable(past)
        shapes = next((past.layers for past in pasts if past.layers), {})
        layers = {}
        for index, examples in shapes.items():
            empty = tuple(example[:1, :, :0] for example in examples)
            parts = [past.layers.get(index, empty) for past in pasts]
            length = max(keys.shape[2] for keys, _ in parts)
            padded = (
                torch.cat([torch.nn.functional.pad(p[i], (0, 0, length - p[i].shape[2], 0)) for p in parts])
                for i in range(2)
            )
            layers[index] = cast(tuple[Tensor, Tensor], tuple(padded))
        return TorchPast(layers, MemoryState.stack([past.memory for past in pasts]))

    def _on_device(self, memory: StoredMemory) -> MemoryState:
        states, segments = (
            {layer: torch.tensor(array, device=self.model.device) for layer, array in part.items()}
            for part in (memory.states, memory.open_segments)
        )
        return MemoryState(states, memory.adapter, segments)


def stop_tokens(model: PreTrainedModel, text: ChatText) -> frozenset[int]:
    """Ids that end an answer of `model`."""
    return text.stop_tokens(getattr(model.generation_config, "eos_token_id", None))


def _keeps_keys_and_values(layer: Any) -> bool:
    return type(layer) in (DynamicLayer, DynamicSlidingWindowLayer)


def _check_separable(past: TorchPast) -> None:
    """Raise for a past that cannot be cut or joined: that of layers that keep more than keys and values."""
    if past.others:
        raise ArchitectureError(
            "Rows and columns of this past cannot be taken out.",
            f"Layer {min(past.others)} keeps more than keys and values.",
            "Feed each conversation alone, from its beginning.",
        )

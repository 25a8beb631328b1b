"""A call of a model as a function of tensors, which can be traced."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, StaticCache

from deltamem_tool._compat import DynamicLayer, StaticLayer
from deltamem_tool.memory.adapter import DeltaMemAdapter
from deltamem_tool.memory.cache import MemoryCache
from deltamem_tool.memory.call_options import CallOptions, fill_layer, fill_static_layer
from deltamem_tool.memory.state import MemoryState
from deltamem_tool.onnx import contract
from deltamem_tool.onnx.contract import Interface
from deltamem_tool.onnx.export.attention import FusedAttention, Lengths
from deltamem_tool.onnx.export.attention_nodes import POSITIONS
from deltamem_tool.onnx.export.base_states import BaseStates, packed_order, states_of
from deltamem_tool.onnx.export.cache_layers import columns_of, fill_columns, traced_layer
from deltamem_tool.onnx.export.choices import dynamic_topk
from deltamem_tool.onnx.export.layers import DOMAIN, Past, TracedLayers
from deltamem_tool.onnx.export.targets import Target
from deltamem_tool.segments.tags import SegmentTag


class Step(nn.Module):
    """A call of a model as a function of tensors, which is traced. Its nested names become those of the graph.

    Without an `adapter`, it is a call of the model without a memory. It still takes `write_mask`, so that both graphs
    are called in the same way.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        adapter: DeltaMemAdapter | None,
        options: CallOptions,
        interface: Interface,
        layers: TracedLayers,
        target: Target,
    ) -> None:
        super().__init__()
        self.model = model
        self._interface, self._target = interface, target
        self._max_length = interface.max_length  # 0 if keys and values grow
        self.adapter = adapter  # not a submodule of the model; registered here, so that its weights are in the graph
        self._fingerprint = "" if adapter is None else adapter.fingerprint
        self._options = options
        self.layers = layers

    @property
    def positions(self) -> int | None:
        """Maximum number of tokens in a context; None for no limit."""
        return self._options.positions

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Return no parameters, because the exporter would cast every input to the type of the first one.

        In a half-precision model, the states stay float32. The exporter traces the `named_parameters`.
        """
        return iter(())

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        write_mask: Tensor | None = None,
        past_key_values: Sequence[dict[str, Tensor]] = (),
        segment_end: Tensor | None = None,
        initial: Sequence[dict[str, Tensor]] = (),
        past_length: Tensor | None = None,
    ) -> dict[str, Any]:
        """Map the graph's inputs to its outputs, as named in `contract`; those of layers are lists of dictionaries."""
        if self._interface.packed:
            return self._packed_call(
                input_ids, attention_mask, write_mask, past_key_values, segment_end, initial, past_length
            )
        columns, valid = None, None  # of the mask, for the call's tokens; None for its last ones
        if past_length is not None:
            columns = past_length + torch.arange(input_ids.shape[1])
            valid = attention_mask.index_select(1, columns).bool()
        begins = _begins(attention_mask, input_ids.shape[1]) if initial else None
        memory = self._memory(past_key_values, initial, begins)
        cache = self._cache(input_ids, valid, write_mask, segment_end, memory, self._max_length)
        if not self._max_length:
            cache.layers = [traced_layer(layer) for layer in cache.layers]
        for layer, past in zip(cache.layers, past_key_values, strict=False):
            if contract.KEY in past and past_length is None:
                fill_layer(cast(DynamicLayer, layer), past[contract.KEY], past[contract.VALUE])
                fill_columns(layer, past)
            elif contract.KEY in past and past_length is not None:
                keys, values = past[contract.KEY].clone(), past[contract.VALUE].clone()
                fill_static_layer(cast(StaticLayer, layer), keys, values, past_length[0].clone())
        states = self._base_states(attention_mask, input_ids, cache, past_key_values)
        with states, dynamic_topk(self.model), self.layers.mark_originals():
            logits = self._options.logits(self.model, input_ids, attention_mask, cache, columns)
        return self._results(logits, cache, past_key_values)

    def _base_states(
        self, attention_mask: Tensor, input_ids: Tensor, cache: MemoryCache, past: Past
    ) -> AbstractContextManager[None]:
        """Start the model's own states from `past` inside the block; with a fixed length, it has none."""
        if self._max_length:
            return nullcontext()
        valid = attention_mask[:, -input_ids.shape[1] :].bool()
        before = attention_mask.sum(-1) - valid.sum(-1)
        return BaseStates(valid, self._interface.row_by_row, self._target, before).patch_model(
            self.model, cache, self._interface.layers, past
        )

    def _packed_call(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        write_mask: Tensor | None,
        past_key_values: Past,
        segment_end: Tensor | None,
        initial: Past,
        past_length: Tensor | None,
    ) -> dict[str, Any]:
        """Do the same as `forward` if each row's keys and values are at the front of their buffer."""
        tokens = input_ids.shape[1]
        if past_length is None:
            valid = attention_mask[:, -tokens:].bool()
            total = torch.full((), attention_mask.shape[1], dtype=torch.int32)
            past = attention_mask.sum(-1) - valid.sum(-1)
        else:
            valid = attention_mask.index_select(1, past_length + torch.arange(tokens)).bool()
            total = torch.full((), self._max_length, dtype=torch.int32)
            past = (attention_mask * (torch.arange(self._max_length) < past_length)).sum(-1)
        numbers = packed_order(valid)
        input_ids = input_ids.gather(1, numbers)
        write, end = (None if mask is None else mask.gather(1, numbers) for mask in (write_mask, segment_end))
        packed_valid = torch.arange(tokens) < valid.sum(-1, keepdim=True)
        memory = self._memory(past_key_values, initial, (past == 0)[:, None, None, None])
        cache = self._cache(input_ids, packed_valid, write, end, memory)
        positions = past[:, None] + torch.arange(tokens)
        positions = torch.onnx.ops.symbolic(
            f"{DOMAIN}::{POSITIONS}", [positions], {}, dtype=positions.dtype, shape=list(positions.shape), version=1
        )
        last = (valid.sum(-1, keepdim=True) - 1).clamp(min=0)
        kept = torch.argsort(numbers) if self._options.keeps_all else last
        attention = FusedAttention(Lengths(past, (past + tokens - 1).int(), total))
        states = BaseStates(packed_valid, True, self._target, past)
        with (
            attention.patch_model(self.model, cache, past_key_values),
            states.patch_model(self.model, cache, self._interface.layers, past_key_values),
            self.layers.mark_originals(),
        ):
            logits = self._options.packed_logits(self.model, input_ids, positions, cache, kept)
        return self._results(logits, cache, past_key_values)

    def _cache(
        self,
        input_ids: Tensor,
        valid: Tensor | None,
        write: Tensor | None,
        end: Tensor | None,
        memory: MemoryState | None,
        max_length: int = 0,
    ) -> Any:
        """Return a cache without keys and values; masks are `[B, T]`. Pass `valid` if the model gets no mask."""
        if self.adapter is None:
            config = self.model.config
            return StaticCache(config=config, max_cache_len=max_length) if max_length else DynamicCache(config=config)
        cache = MemoryCache(self.model, write=True if write is None else write, max_length=max_length or None)
        if end is not None and write is not None:
            cache.segment_tags = segment_tags(write, end)
        if valid is not None:
            cache.begin_step(input_ids, valid)
        cache.memory = memory
        return cache

    def _memory(self, past_key_values: Past, initial: Past, begins: Tensor | None) -> MemoryState | None:
        """Return the memory before the call. Rows in `begins`, bool `[B, 1, 1, 1]`, start from the `initial` states."""
        if self.adapter is None:
            return None
        shapes = self._interface.state_shapes  # in other layers, it is a recurrent state of the base model
        states = {i: past[contract.STATE] for i, past in enumerate(past_key_values) if i in shapes and past}
        if initial and begins is not None:
            states = {i: torch.where(begins, initial[i][contract.STATE], state) for i, state in states.items()}
        segments = {i: past[contract.SEGMENT] for i, past in enumerate(past_key_values) if contract.SEGMENT in past}
        return MemoryState(states, self._fingerprint, segments)

    def _results(self, logits: Tensor, cache: Any, past_key_values: Past) -> dict[str, Any]:
        """Return the graph's outputs."""
        present: list[dict[str, Tensor]] = []
        for i, past in enumerate(past_key_values):
            present.append({})
            if self._interface.genai and contract.CONV in past:
                present[i][contract.CONV] = past[contract.CONV].clone()
            if contract.KEY in past:
                layer = cast(DynamicLayer, cache.layers[i])
                present[i] |= {contract.KEY: cast(Tensor, layer.keys), contract.VALUE: cast(Tensor, layer.values)}
                present[i] |= columns_of(cache.layers[i])
            if self._interface.layers[i].base_states and past:
                present[i] |= states_of(cache.layers[i], self._interface.layers[i])
            if contract.STATE in past and self._interface.layers[i].state is not None:
                present[i][contract.STATE] = cache.memory.layers[i]
            if contract.SEGMENT in past:
                present[i][contract.SEGMENT] = cache.memory.open_segments[i]
        return {contract.LOGITS_OUTPUT: logits.float(), contract.PRESENT: present}


def segment_tags(write: Tensor, end: Tensor) -> Tensor:
    """Return `MemoryCache.segment_tags`, int8 `[B, T]`, from the masks of the graph, bool `[B, T]`."""
    inside = torch.where(end, SegmentTag.LAST, SegmentTag.INSIDE)
    return torch.where(write, inside, SegmentTag.OUTSIDE).to(torch.int8)  # cast last: browsers have no Where for int8


def _begins(attention_mask: Tensor, tokens: int) -> Tensor:
    """Return the rows without past tokens, bool `[B, 1, 1, 1]`: all their valid tokens belong to this call."""
    return (attention_mask.sum(-1) == attention_mask[:, -tokens:].sum(-1))[:, None, None, None]

"""A model without a memory as a graph of the same kind: what a graph with one is compared with, and no folder to run.

It comes through the same exporter, for the same target, with the same rewrites as far as they are not about a memory,
and is called as the graph with one is. It has no manifest, tokenizer or configs.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, StaticCache

from deltamem_tool._compat import OnnxExporter
from deltamem_tool.memory.call_options import CallOptions, fill, fill_static
from deltamem_tool.onnx import contract
from deltamem_tool.onnx.contract import Interface
from deltamem_tool.onnx.export.rewrites import optimize
from deltamem_tool.onnx.export.targets import Target
from deltamem_tool.onnx.export.trace import graph_of


class PlainStep(nn.Module):
    """One call of a model that has no memory, as a function of tensors. `max_length` is the interface's."""

    def __init__(self, model: PreTrainedModel, options: CallOptions, max_length: int = 0) -> None:
        super().__init__()
        self.model, self._options, self._max_length = model, options, max_length

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        write_mask: Tensor,
        past_key_values: list[dict[str, Tensor]],
        past_length: Tensor | None = None,
    ) -> dict[str, Any]:
        """`write_mask` is taken so that both graphs are called alike; nothing writes."""
        cache: Any = DynamicCache(config=self.model.config)
        columns = None
        if past_length is not None:
            cache = StaticCache(config=self.model.config, max_cache_len=self._max_length)
            columns = past_length + torch.arange(input_ids.shape[1])
        for layer, past in zip(cache.layers, past_key_values, strict=False):
            if contract.KEY not in past:
                continue
            keys, values = past[contract.KEY], past[contract.VALUE]
            if past_length is None:
                fill(layer, keys, values)
            else:
                fill_static(layer, keys.clone(), values.clone(), past_length[0].clone())
        logits = self._options.logits(self.model, input_ids, attention_mask, cache, columns).float()
        present: list[dict[str, Tensor]] = [{} for _ in past_key_values]
        for i, past in enumerate(past_key_values):
            if contract.KEY in past:
                present[i] = {contract.KEY: cache.layers[i].keys, contract.VALUE: cache.layers[i].values}
        return {contract.LOGITS_OUTPUT: logits, contract.PRESENT: present}


def without_memory(interface: Interface) -> Interface:
    """What the graph of the same model without its memory takes and gives."""
    layers = tuple(dataclasses.replace(layer, state=None) for layer in interface.layers)
    return dataclasses.replace(interface, segment=0, layers=layers)


def write_plain(
    model: PreTrainedModel,
    options: CallOptions,
    interface: Interface,
    target: Target,
    folder: Path,
) -> None:
    """Write graph and weights into `folder`, which is made.

    Args:
        model: it has no memory now.
        options: how to call it; made while it had one.
        interface: from `without_memory`.
        target: what will run the graph.
        folder: must not be there.
    """
    with torch.no_grad():
        program = graph_of(PlainStep(model, options, interface.max_length), interface, target)
    if target.fusions is not None:
        optimize(program)
    folder.mkdir(parents=True)
    OnnxExporter.save_program(program, folder / contract.MODEL_FILE)

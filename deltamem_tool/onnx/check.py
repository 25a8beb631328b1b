"""An exported graph against PyTorch: whole conversations through both, before anyone sees the folder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from deltamem_tool.onnx.fixed import FixedGraph
from deltamem_tool.onnx.session import Graph
from deltamem_tool.onnx.trace import CallOptions, segment_marks
from deltamem_tool.state import MemoryCache, MemoryState


@dataclass(frozen=True)
class _Call:
    """Inputs of one call of a conversation; masks are over this call's tokens alone."""

    input_ids: Tensor  # [B, T]
    valid: Tensor  # bool [B, T]
    write: Tensor  # bool [B, T]
    last: Tensor  # bool [B, T], tokens that end a segment


def _conversation(batch: int, vocab_size: int) -> list[_Call]:
    """A prefill padded left, one padded right, single tokens and a longer piece; writes on, off, and mixed."""
    random = torch.Generator().manual_seed(batch)
    calls = []
    for tokens, write in (
        (11, "on"),
        (6, "mixed"),
        (1, "on"),
        (1, "off"),
        (1, "on"),
        (70, "off"),
        (9, "mixed"),
        (1, "on"),
    ):
        valid = torch.ones(batch, tokens, dtype=torch.bool)
        for row in range(1, batch if tokens > 1 else 0):
            padding = slice(0, 2 * row) if tokens == 11 else slice(tokens - row, tokens)
            valid[row, padding] = False
        mixed = torch.rand(batch, tokens, generator=random) < 0.5
        writes = {"on": torch.ones_like(valid), "off": torch.zeros_like(valid), "mixed": mixed}[write]
        last = torch.rand(batch, tokens, generator=random) < 0.2
        calls.append(_Call(torch.randint(vocab_size, (batch, tokens), generator=random), valid, writes & valid, last))
    return calls


@torch.no_grad()
def largest_difference(model: PreTrainedModel, graph: Graph | FixedGraph, options: CallOptions) -> float:
    """Over the logits of valid positions and the states, of whole conversations, alone and in a batch. A graph of fixed
    length is spared the calls that it has no room for."""
    differences = []
    for batch in (1, 3):
        cache = MemoryCache(model)
        past: Any = graph.empty_past(batch)
        mask = torch.zeros(batch, 0, dtype=torch.long)
        for call in _conversation(batch, graph.interface.vocab_size):
            if 0 < graph.interface.max_length < mask.shape[1] + call.valid.shape[1]:
                continue
            mask = torch.cat([mask, call.valid.long()], dim=1)
            cache.write = call.write.to(model.device)
            if graph.interface.segment:
                cache.segments = segment_marks(call.write, call.last).to(model.device)
            expected = options.logits(model, call.input_ids.to(model.device), mask.to(model.device), cache).cpu()
            last = call.last.numpy() if graph.interface.segment else None
            found, past = graph.step(call.input_ids.numpy(), mask.numpy(), call.write.numpy(), past, last)
            valid = call.valid[:, -1:] if graph.interface.logits == "last" else call.valid
            differences.append((torch.from_numpy(found) - expected)[valid])
            memory = cast(MemoryState, cache.memory)
            for layer, state in graph.states(past).items():
                differences.append(torch.from_numpy(state) - memory.layers[layer].cpu())
            for layer, segment in graph.segments(past).items():
                differences.append(torch.from_numpy(segment) - memory.segments[layer].cpu())
    return float(np.max([float(difference.abs().max()) for difference in differences if difference.numel()]))

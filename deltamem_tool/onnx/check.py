"""An exported graph against PyTorch: whole conversations through both, before anyone sees the folder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from deltamem_tool.model_call import CallOptions, last_valid
from deltamem_tool.onnx.session import Graph
from deltamem_tool.onnx.trace import segment_marks
from deltamem_tool.state import MemoryCache, MemoryState
from deltamem_tool.surgery import adapter_of


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


def _starts(graph: Graph, start: MemoryState | None, adapter: str) -> list[tuple[int, MemoryState | None]]:
    """How many at once, and the memory that they begin with. Where a graph has initial states, they are set once."""
    found: list[tuple[int, MemoryState | None]] = [(1, start), (3, start)]
    if graph.interface.defaults():
        random = torch.Generator().manual_seed(0)
        shapes = graph.interface.state_shapes
        states = {i: torch.randn(1, *shape, generator=random) for i, shape in shapes.items()}
        found.append((1, MemoryState(states, adapter)))
    return found


@torch.no_grad()
def largest_difference(
    model: PreTrainedModel, graph: Graph, options: CallOptions, start: MemoryState | None = None
) -> float:
    """Over the logits of valid positions and the states, of whole conversations, alone and in a batch.

    Args:
        start: one row, what the graph's conversations begin with if nothing is given; zeros by default.
    """
    differences = []
    of_rows = graph.interface.genai and graph.interface.logits == "last"
    if of_rows:  # what the graph cuts while it computes is cut here from the whole
        options = CallOptions(model, "all")
    for batch, given in _starts(graph, start, adapter_of(model).fingerprint):
        cache = MemoryCache(model, given.fork(batch).to(model.device) if given is not None else None)
        states = None if given is None or given is start else {i: s.numpy() for i, s in given.layers.items()}
        past = graph.empty_past(batch, states)
        mask = torch.zeros(batch, 0, dtype=torch.long)
        for call in _conversation(batch, graph.interface.vocab_size):
            mask = torch.cat([mask, call.valid.long()], dim=1)
            write = call.valid if graph.interface.genai else call.write  # there, every token writes
            cache.write = write.to(model.device)
            if graph.interface.segment:
                cache.segments = segment_marks(call.write, call.last).to(model.device)
            expected = options.logits(model, call.input_ids.to(model.device), mask.to(model.device), cache).cpu()
            last = call.last.numpy() if graph.interface.segment else None
            found, past = graph.step(call.input_ids.numpy(), mask.numpy(), write.numpy(), past, last)
            valid = call.valid[:, -1:] if graph.interface.logits == "last" else call.valid
            if of_rows:
                position = last_valid(mask, call.valid.shape[1])
                expected = expected[torch.arange(batch), position][:, None]
                valid = call.valid.any(dim=1, keepdim=True)
            differences.append((torch.from_numpy(found) - expected)[valid])
            memory = cast(MemoryState, cache.memory)
            for layer, state in graph.states(past).items():
                differences.append(torch.from_numpy(state) - memory.layers[layer].cpu())
            for layer, segment in graph.segments(past).items():
                differences.append(torch.from_numpy(segment) - memory.segments[layer].cpu())
    return float(np.max([float(difference.abs().max()) for difference in differences if difference.numel()]))

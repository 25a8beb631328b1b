"""An exported graph against PyTorch: whole conversations through both, before anyone sees the folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from deltamem_tool.onnx.contract import Interface
from deltamem_tool.onnx.runtime import Graph
from deltamem_tool.onnx.trace import CallOptions, segment_marks
from deltamem_tool.state import MemoryCache, MemoryState

GREEDY_ROWS, GREEDY_PROMPT, GREEDY_TOKENS = 8, 16, 32  # of `greedy_agreement`


@dataclass(frozen=True)
class _Call:
    """Inputs of one call of a conversation; masks are over this call's tokens alone."""

    input_ids: Tensor  # [B, T]
    valid: Tensor  # bool [B, T]
    write: Tensor  # bool [B, T]
    last: Tensor  # bool [B, T], tokens that end a segment


# What a call gives, float32: logits [B, 1, V] or [B, T, V], and the states and open segments by layer.
_Result = tuple[Tensor, dict[int, Tensor], dict[int, Tensor]]
_Step = Callable[[_Call, Tensor], _Result]  # a call, and the mask [B, P + T] up to its end


def largest_difference(model: PreTrainedModel, graph: Graph, options: CallOptions) -> float:
    """Over the logits of valid positions and the states, of whole conversations, alone and in a batch."""
    interface = graph.interface
    return _difference(interface, _run(interface, _pytorch(model, interface, options)), _run(interface, _onnx(graph)))


def half_precision_errors(model: PreTrainedModel, graph: Graph, options: CallOptions) -> tuple[float, float]:
    """How far ONNX Runtime, and how far PyTorch, is from what a `model` of half precision says with its weights, as
    they are, taken to float32: largest differences as above. Kernels round each in their own way; that is the truth."""
    interface = graph.interface
    in_half = _run(interface, _pytorch(model, interface, options))
    with _in_float32(model):
        truth = _run(interface, _pytorch(model, interface, options))
    return _difference(interface, truth, _run(interface, _onnx(graph))), _difference(interface, truth, in_half)


def greedy_agreement(model: PreTrainedModel, graph: Graph, options: CallOptions) -> float:
    """The share of the greedy tokens of `model`, after random prompts, that `graph` would have chosen too: both go on
    with those of `model`."""
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(graph.interface.vocab_size, (GREEDY_ROWS, GREEDY_PROMPT), generator=random)
    in_pytorch, in_onnx = _pytorch(model, graph.interface, options)(GREEDY_ROWS), _onnx(graph)(GREEDY_ROWS)
    mask, same = torch.zeros(GREEDY_ROWS, 0, dtype=torch.long), 0
    for _ in range(GREEDY_TOKENS):
        every = torch.ones_like(ids, dtype=torch.bool)
        call, mask = _Call(ids, every, every, ~every), torch.cat([mask, every.long()], dim=1)
        ids, found = (step(call, mask)[0][:, -1:].argmax(-1) for step in (in_pytorch, in_onnx))
        same += int((ids == found).sum())
    return same / (GREEDY_ROWS * GREEDY_TOKENS)


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


def _run(interface: Interface, start: Callable[[int], _Step]) -> list[_Result]:
    """The results of every call of conversations of one row and of three."""
    results = []
    for batch in (1, 3):
        step, mask = start(batch), torch.zeros(batch, 0, dtype=torch.long)
        for call in _conversation(batch, interface.vocab_size):
            mask = torch.cat([mask, call.valid.long()], dim=1)
            results.append(step(call, mask))
    return results


def _pytorch(model: PreTrainedModel, interface: Interface, options: CallOptions) -> Callable[[int], _Step]:
    def start(batch: int) -> _Step:
        cache = MemoryCache(model)

        @torch.no_grad()
        def step(call: _Call, mask: Tensor) -> _Result:
            cache.write = call.write.to(model.device)
            if interface.segment:
                cache.segments = segment_marks(call.write, call.last).to(model.device)
            logits = options.logits(model, call.input_ids.to(model.device), mask.to(model.device), cache)
            memory = cast(MemoryState, cache.memory)
            states, segments = ({i: x.cpu() for i, x in of.items()} for of in (memory.layers, memory.segments))
            return logits.cpu().float(), states, segments

        return step

    return start


def _onnx(graph: Graph) -> Callable[[int], _Step]:
    def start(batch: int) -> _Step:
        past = graph.empty_past(batch)

        def step(call: _Call, mask: Tensor) -> _Result:
            nonlocal past
            last = call.last.numpy() if graph.interface.segment else None
            logits, past = graph.step(call.input_ids.numpy(), mask.numpy(), call.write.numpy(), past, last)
            carried = (graph.states(past), graph.segments(past))
            states, segments = ({i: torch.from_numpy(x) for i, x in of.items()} for of in carried)
            return torch.from_numpy(logits), states, segments

        return step

    return start


def _difference(interface: Interface, expected: list[_Result], found: list[_Result]) -> float:
    calls = chain.from_iterable(_conversation(batch, interface.vocab_size) for batch in (1, 3))
    differences = []
    for call, (logits, *carried), (found_logits, *found_carried) in zip(calls, expected, found, strict=True):
        valid = call.valid[:, -1:] if interface.logits == "last" else call.valid
        differences.append((found_logits - logits)[valid])
        for of, found_of in zip(carried, found_carried, strict=True):
            differences += [found_of[layer] - of[layer] for layer in of]
    # numpy's maximum, unlike Python's, does not lose a NaN.
    return float(np.max([float(difference.abs().max()) for difference in differences if difference.numel()]))


@contextmanager
def _in_float32(model: PreTrainedModel) -> Iterator[None]:
    """Weights and buffers of half precision as float32 inside the block: exactly the same numbers, there and back."""
    tensors = {id(x): x for x in chain(model.parameters(), model.buffers()) if x.is_floating_point()}.values()
    narrow = [(x, x.dtype) for x in tensors if x.dtype in (torch.float16, torch.bfloat16)]
    try:
        for x, _ in narrow:
            x.data = x.data.float()
        yield
    finally:
        for x, dtype in narrow:
            x.data = x.data.to(dtype)

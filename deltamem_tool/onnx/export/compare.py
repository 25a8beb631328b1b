"""Compare an exported graph with PyTorch on whole conversations, before the folder appears."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from deltamem_tool.memory.attach import adapter_of
from deltamem_tool.memory.cache import MemoryCache
from deltamem_tool.memory.call_options import CallOptions, last_valid
from deltamem_tool.memory.state import MemoryState
from deltamem_tool.onnx.contract import Interface
from deltamem_tool.onnx.export.choices import FirstOfEqual
from deltamem_tool.onnx.export.step import segment_tags
from deltamem_tool.onnx.runtime.buffered_graph import BufferedGraph
from deltamem_tool.onnx.runtime.graph import Graph

GREEDY_ROWS, GREEDY_PROMPT, GREEDY_TOKENS, GREEDY_SEGMENT = 8, 16, 32, 8  # of `greedy_agreement`
PADDED_ROWS = 3  # of a batch that is padded on the left


@dataclass(frozen=True)
class _Call:
    """Inputs of one call of a conversation; masks are over this call's tokens alone."""

    input_ids: Tensor  # [B, T]
    valid: Tensor  # bool [B, T]
    write: Tensor  # bool [B, T]
    last: Tensor  # bool [B, T], tokens that end a segment


@dataclass(frozen=True)
class _Start:
    """How a conversation begins."""

    batch: int
    memory: MemoryState | None = None  # one row; None for zeros
    as_input: bool = False  # its memory is fed to the graph; otherwise it is what the graph begins with by itself


# What a call gives, float32: logits [B, 1, V] or [B, T, V], and the states and open segments by layer.
_Result = tuple[Tensor, dict[int, Tensor], dict[int, Tensor]]
_Step = Callable[[_Call, Tensor], _Result]  # a call, and the mask [B, P + T] up to its end
Report = Callable[[int, int], object]  # called with the number of calls that are done, and of all


def silent(done: int, of: int) -> None:
    """Report nothing."""


def largest_difference(
    model: PreTrainedModel,
    graph: Graph | BufferedGraph,
    options: CallOptions,
    start: MemoryState | None = None,
    report: Report = silent,
) -> float:
    """Over the logits of valid positions and the states, of whole conversations, alone and in a batch with padding.

    And over the logits of a batch with padding and of its rows alone, both in PyTorch.

    Args:
        model: PyTorch's side.
        graph: ONNX Runtime's side.
        options: how the model is called.
        start: one row, what the graph's conversations begin with if nothing is given; zeros by default.
        report: called after each call of either side.
    """
    starts = _starts(model, graph.interface, start)
    in_pytorch = _in_pytorch(model, graph.interface, starts, options, _half(report, 0))
    in_onnx = _run(graph.interface, starts, _onnx(graph), _half(report, 1))
    difference = _difference(graph.interface, starts, in_pytorch, in_onnx)
    return float(np.maximum(difference, _padding_difference(model, graph.interface)))


def _half(report: Report, half: int) -> Report:
    """Reports the calls of one side as the first or second half of all."""
    return lambda done, of: report(half * of + done, 2 * of)


@dataclass(frozen=True)
class GraphResults:
    """Results of a graph, which may have been closed since."""

    interface: Interface
    starts: list[_Start]
    results: list[_Result]


def in_onnx_runtime(model: PreTrainedModel, graph: Graph | BufferedGraph, report: Report = silent) -> GraphResults:
    """The conversations of `half_precision_errors`, which `graph` is a graph of `model` for."""
    starts = _starts(model, graph.interface, None)
    return GraphResults(graph.interface, starts, _run(graph.interface, starts, _onnx(graph), _half(report, 0)))


def half_precision_errors(
    model: PreTrainedModel, graph_side: GraphResults, options: CallOptions, report: Report = silent
) -> tuple[float, float]:
    """How far ONNX Runtime, and how far PyTorch, is from a half-precision `model` that computes in float32.

    Largest differences as above; the weights are the same numbers. Kernels round each in their own way: that is the
    truth.
    """
    interface, starts = graph_side.interface, graph_side.starts
    in_half = _in_pytorch(model, interface, starts, options)
    with _in_float32(model):
        truth = _in_pytorch(model, interface, starts, options, _half(report, 1))
        of_padding = _padding_difference(model, interface)
    of_graph, of_pytorch = (_difference(interface, starts, truth, results) for results in (graph_side.results, in_half))
    return float(np.maximum(of_graph, of_padding)), of_pytorch


def greedy_agreement(
    model: PreTrainedModel, graph: Graph | BufferedGraph, options: CallOptions, report: Report = silent
) -> float:
    """The share of the greedy tokens of `model`, after random prompts, that `graph` chooses too.

    Both go on with those of `model`. Where segments are written, they end with the prompt and after every few tokens.
    """
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(graph.interface.vocab_size, (GREEDY_ROWS, GREEDY_PROMPT), generator=random)
    start = _Start(GREEDY_ROWS)
    in_pytorch, in_onnx = _pytorch(model, graph.interface, options)(start), _onnx(graph)(start)
    mask, same = torch.zeros(GREEDY_ROWS, 0, dtype=torch.long), 0
    new = min(GREEDY_TOKENS, (graph.interface.room or math.inf) - GREEDY_PROMPT)
    for number in range(int(new)):
        every = torch.ones_like(ids, dtype=torch.bool)
        last = ~every
        last[:, -1] = number % GREEDY_SEGMENT == 0
        call, mask = _Call(ids, every, every, last), torch.cat([mask, every.long()], dim=1)
        ids, onnx_ids = (step(call, mask)[0][:, -1:].argmax(-1) for step in (in_pytorch, in_onnx))
        same += int((ids == onnx_ids).sum())
        report(number + 1, int(new))
    return same / (GREEDY_ROWS * new)


def _conversation(batch: int, interface: Interface) -> list[_Call]:
    """A prefill padded left, one padded right, single tokens and a longer piece; writes on, off, and mixed.

    A graph of fixed length gets no calls that it has no room for.
    """
    random = torch.Generator().manual_seed(batch)
    calls: list[_Call] = []
    room = interface.room or math.inf
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
        ids = torch.randint(interface.vocab_size, (batch, tokens), generator=random)
        if tokens <= room:
            calls.append(_Call(ids, valid, writes & valid, last))
            room -= tokens
    return calls


def _starts(model: PreTrainedModel, interface: Interface, start: MemoryState | None) -> list[_Start]:
    """One row and three; and where a graph has initial states, other ones are set once."""
    starts = [_Start(1, start), _Start(3, start)]
    if interface.defaults():
        random = torch.Generator().manual_seed(0)
        normal = partial(torch.randn, dtype=torch.float32, generator=random)
        states = {i: normal(1, *shape) for i, shape in interface.state_shapes.items()}
        starts.append(_Start(1, MemoryState(states, adapter_of(model).fingerprint), as_input=True))
    return starts


def _run(
    interface: Interface, starts: list[_Start], begin: Callable[[_Start], _Step], report: Report = silent
) -> list[_Result]:
    """The results of every call of the conversations."""
    results = []
    conversations = [(start, _conversation(start.batch, interface)) for start in starts]
    count = sum(len(calls) for _, calls in conversations)
    for start, calls in conversations:
        step, mask = begin(start), torch.zeros(start.batch, 0, dtype=torch.long)
        for call in calls:
            mask = torch.cat([mask, call.valid.long()], dim=1)
            results.append(step(call, mask))
            report(len(results), count)
    return results


def _in_pytorch(
    model: PreTrainedModel,
    interface: Interface,
    starts: list[_Start],
    options: CallOptions,
    report: Report = silent,
) -> list[_Result]:
    """What PyTorch says in the conversations.

    Where padding is nothing to the graph, PyTorch gets each row by itself: in a batch it counts padding among the
    tokens of a window, and lets it change the states of a hybrid.
    """
    begin = _pytorch(model, interface, options)
    return _run(interface, starts, partial(_begin_rows, begin) if _ignores_padding(interface) else begin, report)


def _ignores_padding(interface: Interface) -> bool:
    return interface.packed or interface.row_by_row or bool(interface.base_states)


def _begin_rows(begin: Callable[[_Start], _Step], start: _Start) -> _Step:
    """Each row in a conversation of its own, without padding."""
    steps = [begin(replace(start, batch=1)) for _ in range(start.batch)]

    def step(call: _Call, mask: Tensor) -> _Result:
        of_rows = []
        for row, (run, valid) in enumerate(zip(steps, call.valid, strict=True)):
            alone = _Call(*(part[row : row + 1, valid] for part in (call.input_ids, call.valid, call.write, call.last)))
            of_rows.append(run(alone, mask[row : row + 1, mask[row] > 0]))
        all_logits = [logits for logits, *_ in of_rows]
        if all_logits[0].shape[1] > 1:
            together = all_logits[0].new_zeros(*call.valid.shape, all_logits[0].shape[-1])
            together[call.valid] = torch.cat(all_logits, dim=1)[0]
        else:
            together = torch.cat(all_logits)
        states, segments = (
            {i: torch.cat([carried[n][i] for _, *carried in of_rows]) for i in of_rows[0][1 + n]} for n in (0, 1)
        )
        return together, states, segments

    return step


def _pytorch(model: PreTrainedModel, interface: Interface, options: CallOptions) -> Callable[[_Start], _Step]:
    if _of_rows(interface):  # what the graph cuts while it computes is cut here from the whole
        options = CallOptions(model, "all")

    def begin(start: _Start) -> _Step:
        memory = None if start.memory is None else start.memory.fork(start.batch).to(model.device)
        cache = MemoryCache(model, memory)

        @torch.no_grad()
        def step(call: _Call, mask: Tensor) -> _Result:
            cache.write = _writes(interface, call).to(model.device)
            if interface.segment:
                cache.segment_tags = segment_tags(call.write, call.last).to(model.device)
            with FirstOfEqual():
                logits = options.logits(model, call.input_ids.to(model.device), mask.to(model.device), cache)
            if _of_rows(interface):
                logits = logits[torch.arange(start.batch), last_valid(mask, call.valid.shape[1])][:, None]
            memory = cast(MemoryState, cache.memory)
            states, segments = ({i: x.cpu() for i, x in of.items()} for of in (memory.layers, memory.open_segments))
            return logits.cpu().float(), states, segments

        return step

    return begin


@torch.no_grad()
def _padding_difference(model: PreTrainedModel, interface: Interface) -> float:
    """How far the logits of a batch that is padded on the left are, in PyTorch, from those of its rows alone.

    A graph that is called as PyTorch is cannot tell. 0 for models that count padding themselves, and where rows have
    been compared one by one.
    """
    if _ignores_padding(interface):
        return 0.0
    options, call = CallOptions(model, "all"), _conversation(PADDED_ROWS, interface)[0]
    if not options.takes_positions:
        return 0.0
    ids = call.input_ids.to(model.device)
    together = options.logits(model, ids, call.valid.long().to(model.device), MemoryCache(model))
    differences = []
    for row, valid in enumerate(call.valid.to(model.device)):
        text = ids[row : row + 1, valid]
        alone = options.logits(model, text, torch.ones_like(text), MemoryCache(model))
        differences.append((together[row, valid] - alone[0]).abs().max())
    return float(torch.stack(differences).max())


def _onnx(graph: Graph | BufferedGraph) -> Callable[[_Start], _Step]:
    def begin(start: _Start) -> _Step:
        layers = start.memory.layers if start.as_input and start.memory is not None else None
        past: Any = graph.empty_past(start.batch, None if layers is None else {i: x.numpy() for i, x in layers.items()})

        def step(call: _Call, mask: Tensor) -> _Result:
            nonlocal past
            last = call.last.numpy() if graph.interface.segment else None
            write = _writes(graph.interface, call).numpy()
            logits, past = graph.step(call.input_ids.numpy(), mask.numpy(), write, past, last)
            carried = (graph.states(past), graph.segments(past))
            states, segments = ({i: torch.from_numpy(x) for i, x in of.items()} for of in carried)
            return torch.from_numpy(logits), states, segments

        return step

    return begin


def _writes(interface: Interface, call: _Call) -> Tensor:
    return call.valid if interface.genai else call.write  # there, every token writes


def _of_rows(interface: Interface) -> bool:
    """Whether the last logits are those of each row's last token that is not padding."""
    return interface.genai and interface.logits == "last"


def _difference(interface: Interface, starts: list[_Start], expected: list[_Result], actual: list[_Result]) -> float:
    calls = chain.from_iterable(_conversation(start.batch, interface) for start in starts)
    differences = []
    for call, (logits, *carried), (actual_logits, *actual_carried) in zip(calls, expected, actual, strict=True):
        valid = call.valid[:, -1:] if interface.logits == "last" else call.valid
        if _of_rows(interface):
            valid = call.valid.any(dim=1, keepdim=True)
        differences.append((actual_logits - logits)[valid])
        for of, actual_of in zip(carried, actual_carried, strict=True):
            differences += [actual_of[layer] - of[layer] for layer in of]
    # numpy's maximum, unlike Python's, does not lose a NaN.
    return float(np.max([float(difference.abs().max()) for difference in differences if difference.numel()]))


@contextmanager
def _in_float32(model: PreTrainedModel) -> Iterator[None]:
    """Weights and buffers of half precision as float32 inside the block, exactly the same numbers.

    The originals are kept: they are mapped from the checkpoint, mostly, where a copy would take memory.
    """
    tensors = {id(x): x for x in chain(model.parameters(), model.buffers()) if x.is_floating_point()}.values()
    narrow = [(x, x.data) for x in tensors if x.dtype in (torch.float16, torch.bfloat16)]
    try:
        for x, data in narrow:
            x.data = data.float()
        yield
    finally:
        for x, data in narrow:
            x.data = data

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
from deltamem_tool.onnx.export.choices import StableTopK
from deltamem_tool.onnx.export.step import segment_tags
from deltamem_tool.onnx.runtime.buffered_graph import BufferedGraph
from deltamem_tool.onnx.runtime.graph import Graph

GREEDY_ROWS, GREEDY_PROMPT, GREEDY_TOKENS, GREEDY_SEGMENT = 8, 16, 32, 8  # sizes in `greedy_agreement`
PADDED_ROWS = 3  # rows of the batch that is padded on the left


@dataclass(frozen=True)
class _Call:
    """Inputs of one call of a conversation. The masks cover only the tokens of this call."""

    input_ids: Tensor  # [B, T]
    valid: Tensor  # bool [B, T]
    write: Tensor  # bool [B, T]
    last: Tensor  # bool [B, T], tokens that end a segment


@dataclass(frozen=True)
class _Start:
    """The start of a conversation."""

    batch: int
    memory: MemoryState | None = None  # one row; None for zeros
    as_input: bool = False  # whether the memory is fed to the graph; otherwise the graph starts from it by itself


# Result of a call, float32: logits [B, 1, V] or [B, T, V], and the states and open segments by layer.
_Result = tuple[Tensor, dict[int, Tensor], dict[int, Tensor]]
_Step = Callable[[_Call, Tensor], _Result]  # takes a call, and the mask [B, P + T] up to its end
Report = Callable[[int, int], object]  # called with the number of finished calls, and the total


def no_report(done: int, of: int) -> None:
    """Report nothing."""


def largest_difference(
    model: PreTrainedModel,
    graph: Graph | BufferedGraph,
    options: CallOptions,
    start: MemoryState | None = None,
    report: Report = no_report,
) -> float:
    """Return the largest difference between PyTorch and ONNX Runtime over whole conversations.

    It covers the logits of valid positions and the states, for single conversations and for a batch with padding. It
    also covers the difference that padding makes in PyTorch itself: the logits of a padded batch and of its rows alone.

    Args:
        model: the model in PyTorch.
        graph: the graph in ONNX Runtime.
        options: how the model is called.
        start: memory of one row that the graph's conversations start from by default; zeros if None.
        report: called after each call of either side.
    """
    starts = _starts(model, graph.interface, start)
    in_pytorch = _in_pytorch(model, graph.interface, starts, options, _half(report, 0))
    in_onnx = _run(graph.interface, starts, _onnx(graph), _half(report, 1))
    difference = _difference(graph.interface, starts, in_pytorch, in_onnx)
    return float(np.maximum(difference, _padding_difference(model, graph.interface)))


def _half(report: Report, half: int) -> Report:
    """Return a function that reports the calls of one side as the first or second half of all calls."""
    return lambda done, of: report(half * of + done, 2 * of)


@dataclass(frozen=True)
class GraphResults:
    """Results of a graph, which may be closed by now."""

    interface: Interface
    starts: list[_Start]
    results: list[_Result]


def run_in_onnx_runtime(
    model: PreTrainedModel, graph: Graph | BufferedGraph, report: Report = no_report
) -> GraphResults:
    """Run the conversations of `half_precision_errors` with `graph`, which was exported from `model`."""
    starts = _starts(model, graph.interface, None)
    return GraphResults(graph.interface, starts, _run(graph.interface, starts, _onnx(graph), _half(report, 0)))


def half_precision_errors(
    model: PreTrainedModel, graph_side: GraphResults, options: CallOptions, report: Report = no_report
) -> tuple[float, float]:
    """Return the errors of ONNX Runtime and of PyTorch in half precision.

    Each is the largest difference, as in `largest_difference`, from `model` with the same weights computed in float32.
    Kernels round differently, so the float32 result is the reference for both.
    """
    interface, starts = graph_side.interface, graph_side.starts
    in_half = _in_pytorch(model, interface, starts, options)
    with _in_float32(model):
        truth = _in_pytorch(model, interface, starts, options, _half(report, 1))
        of_padding = _padding_difference(model, interface)
    of_graph, of_pytorch = (_difference(interface, starts, truth, results) for results in (graph_side.results, in_half))
    return float(np.maximum(of_graph, of_padding)), of_pytorch


def greedy_agreement(
    model: PreTrainedModel, graph: Graph | BufferedGraph, options: CallOptions, report: Report = no_report
) -> float:
    """Return the share of the greedy tokens of `model`, after random prompts, that `graph` also chooses.

    Both continue with the tokens of `model`. If segments are written, they end with the prompt and after every few
    tokens.
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
    """Return the calls of a conversation.

    They are a prompt padded on the left, one padded on the right, single tokens and a longer piece, with writes on, off
    and mixed. Calls for which a graph of fixed length has no room are left out.
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
    """Return starts with one row and with three; if the graph has initial states, also one that sets other states."""
    starts = [_Start(1, start), _Start(3, start)]
    if interface.defaults():
        random = torch.Generator().manual_seed(0)
        normal = partial(torch.randn, dtype=torch.float32, generator=random)
        states = {i: normal(1, *shape) for i, shape in interface.state_shapes.items()}
        starts.append(_Start(1, MemoryState(states, adapter_of(model).fingerprint), as_input=True))
    return starts


def _run(
    interface: Interface, starts: list[_Start], begin: Callable[[_Start], _Step], report: Report = no_report
) -> list[_Result]:
    """Return the results of every call of the conversations."""
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
    report: Report = no_report,
) -> list[_Result]:
    """Return the results of PyTorch.

    If padding has no effect in the graph, PyTorch runs each row by itself. In a batch, it would count padding among the
    tokens of a window, and padding would change the states of a hybrid.
    """
    begin = _pytorch(model, interface, options)
    return _run(interface, starts, partial(_begin_rows, begin) if _ignores_padding(interface) else begin, report)


def _ignores_padding(interface: Interface) -> bool:
    return interface.packed or interface.row_by_row or bool(interface.base_states)


def _begin_rows(begin: Callable[[_Start], _Step], start: _Start) -> _Step:
    """Run each row as its own conversation, without padding."""
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
    if _of_rows(interface):  # the logits that the graph selects are selected below
        options = CallOptions(model, "all")

    def begin(start: _Start) -> _Step:
        memory = None if start.memory is None else start.memory.fork(start.batch).to(model.device)
        cache = MemoryCache(model, memory)

        @torch.no_grad()
        def step(call: _Call, mask: Tensor) -> _Result:
            cache.write = _writes(interface, call).to(model.device)
            if interface.segment:
                cache.segment_tags = segment_tags(call.write, call.last).to(model.device)
            with StableTopK():
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
    """Return the difference, in PyTorch, between the logits of a left-padded batch and those of its rows alone.

    Comparing a graph with PyTorch on the same batch would not show it. It is 0 for models that count padding as
    positions, and if rows were compared one by one.
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
    return call.valid if interface.genai else call.write  # in graphs for genai, every token writes


def _of_rows(interface: Interface) -> bool:
    """Return whether the last logits are those of each row's last token that is not padding."""
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
    # Unlike Python's max, NumPy's returns NaN if there is one.
    return float(np.max([float(difference.abs().max()) for difference in differences if difference.numel()]))


@contextmanager
def _in_float32(model: PreTrainedModel) -> Iterator[None]:
    """Convert half-precision weights and buffers to float32 inside the block, without changing their values.

    The originals are kept: most are memory-mapped from the checkpoint, and a copy of them would take memory.
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

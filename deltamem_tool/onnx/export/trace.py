"""Trace a model with a memory as one ONNX graph, with keys, values, states and open segments as inputs and outputs."""

from __future__ import annotations

import gc
import inspect
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, cast

import onnx_ir
import onnxscript.optimizer
import torch
from torch import Tensor
from torch.export import Dim
from transformers import DynamicCache, PreTrainedModel

from deltamem_tool._compat import (
    OnnxConfig,
    OnnxExporter,
    amended_rewrites,
    fuse_for_onnxruntime,
    quiet_exporters,
    without_stack_traces,
)
from deltamem_tool.errors import ExportError
from deltamem_tool.memory.adapter import DeltaMemAdapter
from deltamem_tool.memory.cache import MemoryCache
from deltamem_tool.memory.call_options import CallOptions
from deltamem_tool.onnx import contract
from deltamem_tool.onnx.contract import Interface
from deltamem_tool.onnx.export.attention import replace_rotary
from deltamem_tool.onnx.export.attention_nodes import place_attention
from deltamem_tool.onnx.export.fused_memory import fused_memories
from deltamem_tool.onnx.export.layers import TracedLayers
from deltamem_tool.onnx.export.mixed_norms import split_mixed_norms
from deltamem_tool.onnx.export.repeat import LayerRepeater, without_weights
from deltamem_tool.onnx.export.step import Step
from deltamem_tool.onnx.export.targets import Target
from deltamem_tool.onnx.export.tensor_modes import ExportableCalls, run_every_expert
from deltamem_tool.ops.scan import use_implementation


def trace_model(
    model: PreTrainedModel,
    adapter: DeltaMemAdapter | None,
    interface: Interface,
    options: CallOptions,
    target: Target,
    without: Collection[str] = (),
) -> onnx_ir.Model:
    """Return the graph in the operators of `target`, before its rewrites; `without` names rewrites to leave out.

    If `adapter` is None, `model` has no memory, and `options` were created while it had one.

    Raises:
        ExportError: PyTorch's exporter cannot trace the model.
    """
    layers = TracedLayers(model, adapter, interface, partial(_call_with_padding, model, adapter, options))
    with torch.no_grad(), use_implementation(target.scan), _fuse_memories(adapter, target, without):
        step = Step(model, adapter, options, interface, layers, target)
        rotary = replace_rotary(model) if interface.packed else nullcontext()
        try:
            with rotary, run_every_expert(model), ExportableCalls():
                return _graph_of(step, interface, target)
        except Exception as error:  # torch's exporters have no exception type for models that they cannot trace
            if (interrupt := _interrupt_behind(error)) is not None:
                raise interrupt from None
            raise ExportError(
                f"PyTorch cannot trace {type(model).__name__} as one graph for every length.",
                f"{_first_line(error)}.",
                "Run it in PyTorch.",
            ) from error


def _interrupt_behind(error: BaseException) -> BaseException | None:
    """The Ctrl-C during which `error` was raised, or None: when one comes, torch's own cleanup may fail and hide it."""
    cause: BaseException | None = error
    while cause is not None and isinstance(cause, Exception):
        cause = cause.__context__
    return cause


def _graph_of(step: Step, interface: Interface, target: Target) -> onnx_ir.Model:
    """Trace `step`, whose arguments have the names of the inputs of `interface`, as a graph for `target`."""
    inputs, axes = _sample(interface, step.layers.copies, step.positions)
    # Guards from a model's own shape checks need not hold for the graph, which is compared with PyTorch later.
    config = OnnxConfig(
        dynamic_shapes=axes,
        opset_version=target.opset,
        optimize=False,
        prefer_deferred_runtime_asserts_over_guards=True,
    )
    weights: dict[str, Tensor] = {}
    for named in (step.named_parameters, step.named_buffers):
        weights |= dict(named(remove_duplicate=False))
    with (
        quiet_exporters(),
        without_stack_traces(),
        amended_rewrites(),
        _without_collection(),
        step.layers.without_copies(),
    ):
        # The exporter accepts any module.
        program = cast(onnx_ir.Model, OnnxExporter().export(cast(PreTrainedModel, step.eval()), inputs, config).program)
        _optimize(program, step.layers, weights, interface, target)
    _name_axes(program.graph, interface)
    for graph in program.graphs():
        for node in graph:
            node.metadata_props.clear()  # the exporter's metadata has paths of this machine
    return program


def _call_with_padding(model: PreTrainedModel, adapter: DeltaMemAdapter | None, options: CallOptions) -> None:
    """Call the model with two short texts, one of them padded."""
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]], device=model.device)
    cache = DynamicCache(config=model.config) if adapter is None else MemoryCache(model)
    options.logits(model, torch.zeros_like(mask), mask, cast(MemoryCache, cache))


@contextmanager
def _without_collection() -> Iterator[None]:
    """Disable garbage collection inside the block. It would take 10 % of the time, as tracing creates many objects."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _optimize(
    program: onnx_ir.Model,
    layers: TracedLayers,
    weights: Mapping[str, Tensor],
    interface: Interface,
    target: Target,
) -> None:
    """Fold constants, fuse operators, and insert copies for the layers that were not traced."""
    own = _own_weights(weights, layers.names)
    with without_weights(program.graph, {name for names in own.values() for name in names.values()}):
        onnxscript.optimizer.optimize(program)
        if target.fusions is not None:
            fuse_for_onnxruntime(program, target.fusions)
            split_mixed_norms(program.graph)
            place_attention(program.graph, interface)
    LayerRepeater(program.graph, layers.copies, own, weights).repeat()
    _order(program.graph, interface)


def _order(graph: onnx_ir.Graph, interface: Interface) -> None:
    """Put inputs and outputs into the order of the contract."""
    for values, names in (
        (graph.inputs, [*interface.inputs(), *interface.defaults()]),
        (graph.outputs, [*interface.outputs()]),
    ):
        ordered = sorted(values, key=lambda value: names.index(str(value.name)))
        values.clear()
        values.extend(ordered)


def _own_weights(weights: Mapping[str, Tensor], layers: Mapping[int, str]) -> dict[int, dict[str, str]]:
    """Return the names of each layer's own weights by their names inside the layer; shared weights are left out."""
    own = {}
    for index, layer in layers.items():
        prefixes = (f"model.{layer}.", f"adapter.layers.{index}.")
        named = [(part, name) for name in weights for part in (0, 1) if name.startswith(prefixes[part])]
        own[index] = {f"{part}.{name.removeprefix(prefixes[part])}": name for part, name in named}
    users = Counter(id(weights[name]) for names in own.values() for name in names.values())
    return {
        index: {part: name for part, name in names.items() if users[id(weights[name])] == 1}
        for index, names in own.items()
    }


@contextmanager
def _fuse_memories(adapter: DeltaMemAdapter | None, target: Target, without: Collection[str]) -> Iterator[None]:
    """Replace the memories of `adapter` by fused ones inside the block, if possible."""
    if adapter is None:
        yield
        return
    fused = {str(layer): memory for layer, memory in fused_memories(adapter, target, without).items()}
    originals = {layer: adapter.layers[layer] for layer in fused}
    adapter.layers.update(fused)
    try:
        yield
    finally:
        adapter.layers.update(originals)


def _sample(
    interface: Interface, copies: Collection[int], positions: int | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the arguments to trace with and their dynamic axes; layers in `copies` have none.

    Sizes of 0 and 1 would be treated as constants. A context of `positions` has room for past and new tokens, because
    the graph is not traced beyond the model's positions.
    """
    sizes = {contract.BATCH: 2, contract.TOKENS: 3, contract.PAST_TOKENS: 4, contract.ALL_TOKENS: 7}
    longest = None if positions is None else max(positions - 2, sizes[contract.PAST_TOKENS])
    dims = {name: Dim(name, max=longest) for name in (contract.TOKENS, contract.PAST_TOKENS)}
    dims[contract.BATCH] = Dim(contract.BATCH)
    # The mask's length is the sum of two others. This cannot be declared, but torch infers it.
    dims[contract.ALL_TOKENS] = Dim.DYNAMIC
    nested = (contract.PAST, contract.INITIAL) if interface.defaults() else (contract.PAST,)
    inputs: dict[str, Any] = {prefix: [{} for _ in interface.layers] for prefix in nested}
    axes: dict[str, Any] = {prefix: [{} for _ in interface.layers] for prefix in nested}
    for name, (dtype, shape) in {**interface.inputs(), **interface.defaults()}.items():
        tensor = torch.ones(
            [sizes[size] if isinstance(size, str) else size for size in shape], dtype=getattr(torch, dtype)
        )
        vary = {axis: dims[size] for axis, size in enumerate(shape) if isinstance(size, str)}
        prefix, *rest = name.split(".")
        if prefix in nested:
            layer, part = rest
            if int(layer) in copies:
                continue
            inputs[prefix][int(layer)][part], axes[prefix][int(layer)][part] = tensor, vary
        else:
            inputs[name], axes[name] = tensor, vary
    order = [name for name in inspect.signature(Step.forward).parameters if name in inputs]
    return {name: inputs[name] for name in order}, {name: axes[name] for name in order}


def _name_axes(graph: onnx_ir.Graph, interface: Interface) -> None:
    """Give the dynamic axes of inputs and outputs the names of the contract instead of s12 or s70."""
    expected = {**interface.inputs(), **interface.outputs()}
    for value in (*graph.inputs, *graph.outputs):
        if value.name in expected and value.shape is not None:
            names = expected[value.name][1]
            if len(names) == len(value.shape):
                sizes = zip(names, value.shape, strict=True)
                value.shape = onnx_ir.Shape([size if isinstance(size, int) else name for name, size in sizes])


def _first_line(error: BaseException) -> str:
    """Return the first line of the original error, which torch's exporters wrap several times."""
    while error.__cause__ is not None:
        error = error.__cause__
    message = str(error).partition("For more information")[0].strip().partition("\n")[0]
    return f"{type(error).__name__}: {message[:200].rstrip('.!')}"

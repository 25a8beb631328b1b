"""A model with a memory as one ONNX graph: keys, values, states and open segments go in and come out by name."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import onnx_ir
import torch
from torch import Tensor, nn
from torch.export import Dim
from transformers import PreTrainedModel

from deltamem_tool._compat import (
    DummyLayer,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
    OnnxConfig,
    OnnxExporter,
    StaticLayer,
    quiet_exporters,
    without_stack_traces,
)
from deltamem_tool.errors import ExportError
from deltamem_tool.memory.adapter import DeltaMemAdapter
from deltamem_tool.memory.cache import MemoryCache
from deltamem_tool.memory.call_options import CallOptions, fill, fill_static
from deltamem_tool.memory.state import MemoryState
from deltamem_tool.onnx import contract
from deltamem_tool.onnx.contract import Interface, Layer
from deltamem_tool.onnx.export.fused_memory import fused_memories
from deltamem_tool.onnx.export.targets import Target
from deltamem_tool.ops.scan import use_implementation
from deltamem_tool.segments.tags import SegmentTag


class _Step(nn.Module):
    """One call as a function of tensors: what is traced. Its nested names become the graph's."""

    def __init__(self, model: PreTrainedModel, adapter: DeltaMemAdapter, options: CallOptions, max_length: int) -> None:
        super().__init__()
        self.model = model
        self._max_length = max_length  # 0 where keys and values grow
        self.adapter = adapter  # not part of the model's tree: registered here, its weights land in the graph
        self._fingerprint = adapter.fingerprint
        self._options = options

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """None, for the exporter, which would cast every input to the type of the first one.

        In a model of half precision the states stay float32. What is traced are the `named_parameters`.
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
        write = True if write_mask is None else write_mask
        cache = MemoryCache(self.model, write=write, max_length=self._max_length or None)
        if segment_end is not None and write_mask is not None:
            cache.segment_tags = segment_tags(write_mask, segment_end)
        columns = None  # of the mask, where the tokens are: its last, or
        if past_length is not None:
            columns = past_length + torch.arange(input_ids.shape[1])
            cache.begin_step(input_ids, attention_mask.index_select(1, columns).bool())
        for layer, past in zip(cache.layers, past_key_values, strict=False):
            if contract.KEY in past and past_length is None:
                fill(cast(DynamicLayer, layer), past[contract.KEY], past[contract.VALUE])
            elif contract.KEY in past and past_length is not None:
                keys, values = past[contract.KEY].clone(), past[contract.VALUE].clone()
                fill_static(cast(StaticLayer, layer), keys, values, past_length[0].clone())
        states = {i: past[contract.STATE] for i, past in enumerate(past_key_values) if contract.STATE in past}
        if initial:
            begins = _begins(attention_mask, input_ids.shape[1])
            states = {i: torch.where(begins, initial[i][contract.STATE], state) for i, state in states.items()}
        segments = {i: past[contract.SEGMENT] for i, past in enumerate(past_key_values) if contract.SEGMENT in past}
        cache.memory = MemoryState(states, self._fingerprint, segments)
        logits = self._options.logits(self.model, input_ids, attention_mask, cache, columns)
        present: list[dict[str, Tensor]] = []
        for i, past in enumerate(past_key_values):
            present.append({})
            if contract.KEY in past:
                layer = cast(DynamicLayer, cache.layers[i])
                present[i] |= {contract.KEY: cast(Tensor, layer.keys), contract.VALUE: cast(Tensor, layer.values)}
            if i in states:
                present[i][contract.STATE] = cache.memory.layers[i]
            if i in segments:
                present[i][contract.SEGMENT] = cache.memory.open_segments[i]
            if contract.CONV in past:
                present[i][contract.CONV] = past[contract.CONV].clone()
        return {contract.LOGITS_OUTPUT: logits.float(), contract.PRESENT: present}


def segment_tags(write: Tensor, end: Tensor) -> Tensor:
    """What `MemoryCache.segment_tags` takes, int8 `[B, T]`, from the masks of the graph, bool `[B, T]`."""
    inside = torch.where(end, SegmentTag.LAST, SegmentTag.INSIDE)
    return torch.where(write, inside, SegmentTag.OUTSIDE).to(torch.int8)  # int64 before: browsers have no Where of int8


def _begins(attention_mask: Tensor, tokens: int) -> Tensor:
    """Rows whose past holds no token, bool `[B, 1, 1, 1]`: all their valid tokens are among the last."""
    return (attention_mask.sum(-1) == attention_mask[:, -tokens:].sum(-1))[:, None, None, None]


def interface_of(
    model: PreTrainedModel,
    adapter: DeltaMemAdapter,
    options: CallOptions,
    logits: str,
    target: Target,
    max_length: int = 0,
) -> Interface:
    """What the graph of `model` for `target` will take and give, found by running one token.

    Raises:
        ExportError: the model keeps something other than keys and values between calls, or, where keys and values are
            to be of the fixed length `max_length`, not those of every token.
    """
    if logits not in contract.LOGITS:
        raise ExportError(f"Invalid logits {logits!r}.", "", f"Choose one of {', '.join(contract.LOGITS)}.")
    cache = MemoryCache(model)
    tokens = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    with torch.no_grad():
        vocab_size = model(input_ids=tokens, cache=cache).logits.shape[-1]
    _check_caches(model, cache)
    if max_length:
        _check_fixed_length(model, target, max_length)
    if options.positions is not None and max_length > options.positions:
        raise ExportError(
            f"A maximum length of {max_length} tokens is too long.",
            f"The model has {options.positions} positions.",
            "Choose a smaller one.",
        )
    states, segment = adapter.memory_shape.layers, adapter.memory_shape.segment_width
    layers = []
    for i in range(max(len(cache.layers), *(index + 1 for index in states))):
        # A layer that reads the keys of another one keeps none, and may have no place in the cache.
        held = cache.layers[i] if i < len(cache.layers) else None
        key, value = (_heads_and_width(getattr(held, name, None)) for name in ("keys", "values"))
        layers.append(Layer(key, value, cast(Any, states.get(i))))
    return Interface(
        logits=logits,
        vocab_size=vocab_size,
        dtype=dtype_name(model.dtype),
        segment=segment,
        layers=tuple(layers),
        genai=target.genai,
        max_length=max_length,
        positions=options.positions or 0,
    )


def dtype_name(dtype: torch.dtype) -> str:
    """What the contract calls it."""
    return str(dtype).removeprefix("torch.")


def _heads_and_width(cached: Tensor | None) -> tuple[int, int] | None:
    return None if cached is None else (cached.shape[1], cached.shape[3])


def _check_caches(model: PreTrainedModel, cache: MemoryCache) -> None:
    """Check that the graph can carry what the layers keep.

    Raises:
        ExportError: a layer of `cache` holds something other than the keys and values of every past token.
    """
    carried = (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer)
    for layer in cache.layers:
        if type(layer) not in carried:
            kind = next((why for base, why in _NOT_CARRIED.items() if isinstance(layer, base)), type(layer).__name__)
            raise ExportError(
                f"{type(model).__name__} cannot be exported yet.",
                f"Beside keys and values its layers keep {kind}, which the graph does not carry.",
                "Run it in PyTorch, or export a model whose layers are all attention.",
            )


def _check_fixed_length(model: PreTrainedModel, target: Target, max_length: int) -> None:
    """Check that the graph can have keys and values of a fixed length.

    Raises:
        ExportError: `max_length` is too small, the target's runtime has buffers of its own, or a static layer of the
            model is a window that goes round.
    """
    if max_length < contract.MIN_LENGTH:
        raise ExportError(
            f"A maximum length of {max_length} tokens is too short.",
            f"The graph is compared with PyTorch on a conversation of {contract.MIN_LENGTH} tokens, which must fit.",
            "Choose a larger --max-length.",
        )
    if target.genai:
        raise ExportError(
            f"The target {target.name} takes no --max-length.",
            "Its runtime feeds keys and values that grow.",
            "Leave one of the two out.",
        )
    layers = MemoryCache(model, max_length=max_length).layers
    other = {type(layer).__name__ for layer in layers if type(layer) not in (StaticLayer, DummyLayer)}
    if other:
        raise ExportError(
            f"{type(model).__name__} cannot be exported with a fixed length.",
            f"Some of its layers keep a window of the last tokens alone ({', '.join(sorted(other))}).",
            "Leave --max-length out: keys and values then grow.",
        )


_NOT_CARRIED = {
    LinearAttentionCacheLayerMixin: "recurrent or convolutional states",
    DynamicIndexedLayer: "the keys of an indexer",
}


def traced(
    model: PreTrainedModel,
    adapter: DeltaMemAdapter,
    interface: Interface,
    options: CallOptions,
    target: Target,
    without: Collection[str] = (),
) -> onnx_ir.Model:
    """The graph, in the operators of `target`; `without` names rewrites of `optimize` to leave out.

    Raises:
        ExportError: PyTorch's exporter has no graph for the model.
    """
    step = _Step(model, adapter, options, interface.max_length)
    with torch.no_grad(), use_implementation(target.scan), _fused(adapter, target, without):
        try:
            return graph_of(step, interface, target)
        except Exception as error:  # torch's exporters have no exception of their own for what they cannot trace
            raise ExportError(
                f"PyTorch cannot trace {type(model).__name__} as one graph for every length.",
                f"{_first_line(error)}.",
                "Run it in PyTorch.",
            ) from error


def graph_of(step: nn.Module, interface: Interface, target: Target) -> onnx_ir.Model:
    """`step`, whose arguments are called what the inputs of `interface` are, as a graph for `target`."""
    inputs, axes = _sample(interface)
    # Guards that a model's own shape checks leave behind need not hold for the graph: the comparison decides.
    config = OnnxConfig(
        dynamic_shapes=axes,
        opset_version=target.opset,
        ort_fusions=target.fusions,
        prefer_deferred_runtime_asserts_over_guards=True,
    )
    with quiet_exporters(), without_stack_traces():
        # Any module will do.
        program = OnnxExporter().export(cast(PreTrainedModel, step.eval()), inputs, config).program
    _name_axes(program.graph, interface)
    for graph in program.graphs():
        for node in graph:
            node.metadata_props.clear()  # of the exporter, with this machine's paths
    return cast(onnx_ir.Model, program)


@contextmanager
def _fused(adapter: DeltaMemAdapter, target: Target, without: Collection[str]) -> Iterator[None]:
    """Inside, `adapter` has fused memories in the place of its own, where that can be."""
    fused = {str(layer): memory for layer, memory in fused_memories(adapter, target, without).items()}
    originals = {layer: adapter.layers[layer] for layer in fused}
    adapter.layers.update(fused)
    try:
        yield
    finally:
        adapter.layers.update(originals)


def _sample(interface: Interface) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments to trace with, and which of their axes vary. Sizes of 0 and 1 would be taken for constants."""
    sizes = {contract.BATCH: 2, contract.TOKENS: 3, contract.PAST_TOKENS: 4, contract.ALL_TOKENS: 7}
    # The mask's length is the sum of two others, which torch cannot be told: it finds out.
    dims = {name: Dim.DYNAMIC if name == contract.ALL_TOKENS else Dim(name) for name in sizes}
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
            inputs[prefix][int(layer)][part], axes[prefix][int(layer)][part] = tensor, vary
        else:
            inputs[name], axes[name] = tensor, vary
    order = [name for name in inspect.signature(_Step.forward).parameters if name in inputs]
    return {name: inputs[name] for name in order}, {name: axes[name] for name in order}


def _name_axes(graph: onnx_ir.Graph, interface: Interface) -> None:
    """Call the varying axes of inputs and outputs what the contract calls them, not s12 or s70."""
    expected = {**interface.inputs(), **interface.outputs()}
    for value in (*graph.inputs, *graph.outputs):
        if value.name in expected and value.shape is not None:
            names = expected[value.name][1]
            if len(names) == len(value.shape):
                sizes = zip(names, value.shape, strict=True)
                value.shape = onnx_ir.Shape([size if isinstance(size, int) else name for name, size in sizes])


def _first_line(error: BaseException) -> str:
    """Of what went wrong first, which torch's exporters wrap several times."""
    while error.__cause__ is not None:
        error = error.__cause__
    message = str(error).partition("For more information")[0].strip().partition("\n")[0]
    return f"{type(error).__name__}: {message[:200].rstrip('.!')}"

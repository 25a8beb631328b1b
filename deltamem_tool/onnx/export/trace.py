"""A model with a memory as one ONNX graph: keys, values, states and open segments go in and come out by name."""

from __future__ import annotations

import gc
import inspect
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, cast

import onnx_ir
import onnxscript.optimizer
import torch
from torch import Tensor, nn
from torch.export import Dim
from transformers import DynamicCache, PreTrainedModel, StaticCache

from deltamem_tool._compat import (
    DummyLayer,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
    OnnxConfig,
    OnnxExporter,
    StaticLayer,
    fuse_for_onnxruntime,
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
from deltamem_tool.onnx.export.attention import FusedAttention, Lengths, can_fuse, marked_rotary
from deltamem_tool.onnx.export.attention_nodes import POSITIONS, place_attention
from deltamem_tool.onnx.export.fused_memory import fused_memories
from deltamem_tool.onnx.export.layers import DOMAIN, Past, TracedLayers
from deltamem_tool.onnx.export.repeat import LayerRepeater, without_weights
from deltamem_tool.onnx.export.targets import Target
from deltamem_tool.ops.scan import use_implementation
from deltamem_tool.segments.tags import SegmentTag


class _Step(nn.Module):
    """One call as a function of tensors: what is traced. Its nested names become the graph's.

    Without an `adapter`, of the model without a memory: `write_mask` is taken all the same, so that both graphs are
    called alike.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        adapter: DeltaMemAdapter | None,
        options: CallOptions,
        interface: Interface,
        layers: TracedLayers,
    ) -> None:
        super().__init__()
        self.model = model
        self._max_length = interface.max_length  # 0 where keys and values grow
        self._packed = interface.packed
        self.adapter = adapter  # not part of the model's tree: registered here, its weights land in the graph
        self._fingerprint = "" if adapter is None else adapter.fingerprint
        self._options = options
        self.layers = layers

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
        if self._packed:
            return self._packed_call(
                input_ids, attention_mask, write_mask, past_key_values, segment_end, initial, past_length
            )
        columns, valid = None, None  # of the mask, where the tokens are: its last, or
        if past_length is not None:
            columns = past_length + torch.arange(input_ids.shape[1])
            valid = attention_mask.index_select(1, columns).bool()
        begins = _begins(attention_mask, input_ids.shape[1]) if initial else None
        memory = self._memory(past_key_values, initial, begins)
        cache = self._cache(input_ids, valid, write_mask, segment_end, memory, self._max_length)
        for layer, past in zip(cache.layers, past_key_values, strict=False):
            if contract.KEY in past and past_length is None:
                fill(cast(DynamicLayer, layer), past[contract.KEY], past[contract.VALUE])
            elif contract.KEY in past and past_length is not None:
                keys, values = past[contract.KEY].clone(), past[contract.VALUE].clone()
                fill_static(cast(StaticLayer, layer), keys, values, past_length[0].clone())
        with self.layers.marked():
            logits = self._options.logits(self.model, input_ids, attention_mask, cache, columns)
        return self._results(logits, cache, past_key_values)

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
        """As `forward`, where each row's keys and values lie at the front of their buffer."""
        tokens = input_ids.shape[1]
        if past_length is None:
            valid = attention_mask[:, -tokens:].bool()
            total = torch.full((), attention_mask.shape[1], dtype=torch.int32)
            past = attention_mask.sum(-1) - valid.sum(-1)
        else:
            valid = attention_mask.index_select(1, past_length + torch.arange(tokens)).bool()
            total = torch.full((), self._max_length, dtype=torch.int32)
            past = (attention_mask * (torch.arange(self._max_length) < past_length)).sum(-1)
        numbers = _packed(valid)
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
        with attention.of(self.model, cache, past_key_values), self.layers.marked():
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
        """A cache that holds no keys and values yet; masks `[B, T]`, `valid` where the model is given no mask."""
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
        """What the call begins with; rows that begin a conversation, bool `[B, 1, 1, 1]`, with what is `initial`."""
        if self.adapter is None:
            return None
        states = {i: past[contract.STATE] for i, past in enumerate(past_key_values) if contract.STATE in past}
        if initial and begins is not None:
            states = {i: torch.where(begins, initial[i][contract.STATE], state) for i, state in states.items()}
        segments = {i: past[contract.SEGMENT] for i, past in enumerate(past_key_values) if contract.SEGMENT in past}
        return MemoryState(states, self._fingerprint, segments)

    def _results(self, logits: Tensor, cache: Any, past_key_values: Past) -> dict[str, Any]:
        """The graph's outputs."""
        present: list[dict[str, Tensor]] = []
        for i, past in enumerate(past_key_values):
            present.append({})
            if contract.CONV in past:
                present[i][contract.CONV] = past[contract.CONV].clone()
            if contract.KEY in past:
                layer = cast(DynamicLayer, cache.layers[i])
                present[i] |= {contract.KEY: cast(Tensor, layer.keys), contract.VALUE: cast(Tensor, layer.values)}
            if contract.STATE in past:
                present[i][contract.STATE] = cache.memory.layers[i]
            if contract.SEGMENT in past:
                present[i][contract.SEGMENT] = cache.memory.open_segments[i]
        return {contract.LOGITS_OUTPUT: logits.float(), contract.PRESENT: present}


def _packed(valid: Tensor) -> Tensor:
    """The order in which each row's valid tokens come first, int64 `[B, T]`."""
    tokens = valid.shape[1]
    numbers = torch.arange(tokens)
    return torch.argsort(torch.where(valid, tokens - numbers, -numbers), descending=True)


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
    packed = target.fusions is not None and options.counts_positions and can_fuse(model, len(cache.layers))
    if max_length:
        _check_fixed_length(model, target, max_length, packed)
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
        packed=packed,
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


def _check_fixed_length(model: PreTrainedModel, target: Target, max_length: int, packed: bool) -> None:
    """Check that the graph can have keys and values of a fixed length.

    Raises:
        ExportError: `max_length` is too small, the target's runtime has buffers of its own, or a static layer of the
            model is a window that goes round, where keys and values are not packed.
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
    layers = [] if packed else MemoryCache(model, max_length=max_length).layers
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
    adapter: DeltaMemAdapter | None,
    interface: Interface,
    options: CallOptions,
    target: Target,
    without: Collection[str] = (),
) -> onnx_ir.Model:
    """The graph, in the operators of `target`, before its rewrites; `without` names those that will be left out.

    Without an `adapter`, `model` has no memory, and `options` were made while it had one.

    Raises:
        ExportError: PyTorch's exporter has no graph for the model.
    """
    layers = TracedLayers(model, adapter, interface, partial(_call_with_padding, model, adapter, options))
    with torch.no_grad(), use_implementation(target.scan), _fused(adapter, target, without):
        step = _Step(model, adapter, options, interface, layers)
        rotary = marked_rotary(model) if interface.packed else nullcontext()
        try:
            with rotary:
                return _graph_of(step, interface, target)
        except Exception as error:  # torch's exporters have no exception of their own for what they cannot trace
            raise ExportError(
                f"PyTorch cannot trace {type(model).__name__} as one graph for every length.",
                f"{_first_line(error)}.",
                "Run it in PyTorch.",
            ) from error


def _graph_of(step: _Step, interface: Interface, target: Target) -> onnx_ir.Model:
    """`step`, whose arguments are called what the inputs of `interface` are, as a graph for `target`."""
    inputs, axes = _sample(interface, step.layers.copies)
    # Guards that a model's own shape checks leave behind need not hold for the graph: the comparison decides.
    config = OnnxConfig(
        dynamic_shapes=axes,
        opset_version=target.opset,
        optimize=False,
        prefer_deferred_runtime_asserts_over_guards=True,
    )
    weights: dict[str, Tensor] = {}
    for named in (step.named_parameters, step.named_buffers):
        weights |= dict(named(remove_duplicate=False))
    with quiet_exporters(), without_stack_traces(), _without_collection(), step.layers.without_copies():
        # Any module will do.
        program = cast(onnx_ir.Model, OnnxExporter().export(cast(PreTrainedModel, step.eval()), inputs, config).program)
        _optimize(program, step.layers, weights, interface, target)
    _name_axes(program.graph, interface)
    for graph in program.graphs():
        for node in graph:
            node.metadata_props.clear()  # of the exporter, with this machine's paths
    return program


def _call_with_padding(model: PreTrainedModel, adapter: DeltaMemAdapter | None, options: CallOptions) -> None:
    """Call it on two short texts."""
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]], device=model.device)
    cache = DynamicCache(config=model.config) if adapter is None else MemoryCache(model)
    options.logits(model, torch.zeros_like(mask), mask, cast(MemoryCache, cache))


@contextmanager
def _without_collection() -> Iterator[None]:
    """Inside, nobody looks for cycles of objects: tracing makes millions, and a tenth of its time would go into it."""
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
    """Fold and fuse what was traced, and put copies of it in the place of the layers that were not."""
    own = _own_weights(weights, layers.names)
    with without_weights(program.graph, {name for names in own.values() for name in names.values()}):
        onnxscript.optimizer.optimize(program)
        if target.fusions is not None:
            fuse_for_onnxruntime(program, target.fusions)
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
    """Names of each layer's own weights by what they are called in it; other weights are those of several layers."""
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
def _fused(adapter: DeltaMemAdapter | None, target: Target, without: Collection[str]) -> Iterator[None]:
    """Inside, `adapter` has fused memories in the place of its own, where that can be."""
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


def _sample(interface: Interface, copies: Collection[int]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments to trace with, and which of their axes vary; none for layers that are `copies`.

    Sizes of 0 and 1 would be taken for constants.
    """
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
            if int(layer) in copies:
                continue
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

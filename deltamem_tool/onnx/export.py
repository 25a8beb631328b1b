"""Write a patched model as an ONNX folder, and compare it with PyTorch before anyone sees it."""

from __future__ import annotations

import inspect
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx_ir
import torch
from torch import Tensor, nn
from torch.export import Dim
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import (
    DummyLayer,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
)
from transformers.exporters import OnnxConfig, OnnxExporter
from transformers.utils import logging as transformers_logging

from deltamem_tool.adapter_module import DeltaMemAdapter
from deltamem_tool.errors import ExportError
from deltamem_tool.files import folder_whole, refuse_existing
from deltamem_tool.onnx import contract
from deltamem_tool.onnx.contract import Interface, Layer, Manifest
from deltamem_tool.onnx.runtime import Graph
from deltamem_tool.ops import use_implementation
from deltamem_tool.state import MemoryCache, MemoryState
from deltamem_tool.surgery import adapter_of

TOLERANCE = 1e-3  # largest difference between ONNX Runtime and PyTorch, over logits and states
PACKAGES = ("deltamem-tool", "torch", "transformers", "onnx", "onnxscript")


def export_onnx(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    out: str | Path,
    *,
    logits: str = "last",
    base_model: str | None = None,
    overwrite: bool = False,
    progress: Callable[[str], object] | None = None,
) -> Manifest:
    """Write `out`, whole or not at all: graph, weights, manifest, tokenizer, configs. See `contract` for its interface.

    The graph runs conversations through ONNX Runtime and through `model` before the folder takes its name.

    Args:
        model: a float32 model with a memory.
        tokenizer: its tokenizer; the folder needs a tokenizer.json.
        out: the folder.
        logits: "last" for the last position's alone, "all" for every position's.
        base_model: where the base came from, for the manifest; say nothing that only this machine knows.
        overwrite: replace a folder that is there.
        progress: called with the name of each stage as it begins.

    Raises:
        ExportError: the model cannot be exported, or ONNX Runtime does not compute what PyTorch computes.
        DeltaMemError: `out` is there already.
    """
    refuse_existing(out, overwrite)
    tell = progress or (lambda stage: None)
    adapter = adapter_of(model)
    with _evaluating(model):
        interface = _interface(model, adapter, logits)
        options = _Options(model, logits)
        tell("Tracing the model")
        program = _traced(model, adapter, interface, options)
        with folder_whole(out, overwrite) as staged:
            tell("Writing the graph")
            OnnxExporter.save_program(program, staged / contract.MODEL_FILE)
            model.config.save_pretrained(staged)
            model.generation_config.save_pretrained(staged)
            tokenizer.save_pretrained(staged)
            tell("Comparing ONNX Runtime with PyTorch")
            difference = _largest_difference(model, Graph(staged, interface), options)
            if not difference <= TOLERANCE:  # NaN is no agreement either
                raise ExportError(
                    "The graph does not compute what PyTorch computes.",
                    f"Logits or states differ by {difference:.2g}; {TOLERANCE:.2g} is allowed. Nothing was written.",
                    "Please report it, with the base model's name.",
                )
            manifest = Manifest(
                adapter=adapter.fingerprint,
                mechanism=adapter.config.to_dict(),
                base_model=base_model,
                model_type=model.config.model_type,
                interface=interface,
                max_abs_diff=difference,
                packages={name: version(name) for name in PACKAGES},
            )
            (staged / contract.MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
            contract.check_folder(staged)
    return manifest


class _Options:
    """How `model` is called, in the graph and beside it."""

    def __init__(self, model: PreTrainedModel, logits: str) -> None:
        self._last = logits == "last"
        parameters = inspect.signature(model.forward).parameters
        self._cuts = "logits_to_keep" in parameters
        self._first_position = _first_position(model) if "position_ids" in parameters else None

    def logits(self, model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, cache: MemoryCache) -> Tensor:
        """Those that the graph gives, `[B, 1, V]` or `[B, T, V]`."""
        given: dict[str, Any] = {}
        if self._first_position is not None:
            given["position_ids"] = self._first_position + _positions(attention_mask, input_ids.shape[1])
        if self._cuts:
            given["logits_to_keep"] = 1 if self._last else 0  # 0 is all, for transformers
        logits = model(
            input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True, **given
        ).logits
        return logits if self._cuts or not self._last else logits[:, -1:]


@torch.no_grad()
def _first_position(model: PreTrainedModel) -> int | None:
    """Where `model` begins to count: at zero, or, as RoBERTa does, after the id of its padding. None if it does
    neither: then it counts by itself."""
    ids = torch.tensor([[3, 4, 5]], device=model.device)
    own = model(input_ids=ids, past_key_values=MemoryCache(model)).logits
    padding = getattr(model.config.get_text_config(decoder=True), "pad_token_id", None)
    for first in (0, (padding or 0) + 1):
        positions = first + torch.arange(3, device=model.device)[None]
        if torch.allclose(
            model(ids, position_ids=positions, past_key_values=MemoryCache(model)).logits, own, atol=1e-5
        ):
            return first
    return None


class _Step(nn.Module):
    """One call as a function of tensors: what is traced. Its nested names become the graph's."""

    def __init__(self, model: PreTrainedModel, adapter: DeltaMemAdapter, options: _Options) -> None:
        super().__init__()
        self.model = model
        self.adapter = adapter  # not part of the model's tree: registered here, its weights land in the graph
        self._fingerprint = adapter.fingerprint
        self._options = options

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        write_mask: Tensor,
        past_key_values: list[dict[str, Tensor]],
    ) -> dict[str, Any]:
        cache = MemoryCache(self.model, write=write_mask)
        for layer, past in zip(cache.layers, past_key_values, strict=False):
            if contract.KEY in past:
                _fill(cast(DynamicLayer, layer), past[contract.KEY], past[contract.VALUE])
        states = {i: past[contract.STATE] for i, past in enumerate(past_key_values) if contract.STATE in past}
        cache.memory = MemoryState(states, self._fingerprint)
        logits = self._options.logits(self.model, input_ids, attention_mask, cache)
        present: list[dict[str, Tensor]] = []
        for i, past in enumerate(past_key_values):
            present.append({})
            if contract.KEY in past:
                layer = cast(DynamicLayer, cache.layers[i])
                present[i] |= {contract.KEY: cast(Tensor, layer.keys), contract.VALUE: cast(Tensor, layer.values)}
            if i in states:
                present[i][contract.STATE] = cache.memory.layers[i]
        return {contract.LOGITS_OUTPUT: logits, contract.PRESENT: present}


def _fill(layer: DynamicLayer, key: Tensor, value: Tensor) -> None:
    """What DynamicLayer.update does to a fresh layer, without joining the past to nothing."""
    layer.keys, layer.values, layer.is_initialized = key, value, True
    layer.dtype, layer.device = key.dtype, key.device


def _interface(model: PreTrainedModel, adapter: DeltaMemAdapter, logits: str) -> Interface:
    """What the graph of `model` will take and give, found by running one token.

    Raises:
        ExportError: the model is not float32, or keeps something other than keys and values between calls.
    """
    if logits not in contract.LOGITS:
        raise ExportError(f"There are no {logits!r} logits.", "", f"Choose one of {', '.join(contract.LOGITS)}.")
    if adapter.config.granularity != "token":
        raise ExportError(
            f"A memory that writes by {adapter.config.granularity} cannot be exported yet.",
            "The graph has no place for an open segment.",
            "Run it in PyTorch, or export an adapter that writes every token.",
        )
    if model.dtype != torch.float32:
        raise ExportError(
            f"The model is {model.dtype}.", "The graph is float32.", "Load the model with dtype=torch.float32."
        )
    cache = MemoryCache(model)
    tokens = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    with torch.no_grad():
        vocab_size = model(input_ids=tokens, past_key_values=cache).logits.shape[-1]
    _refuse_other_caches(model, cache)
    states = adapter.memory_shape.layers
    layers = []
    for i in range(max(len(cache.layers), *(index + 1 for index in states))):
        # A layer that reads the keys of another one keeps none, and may have no place in the cache.
        held = cache.layers[i] if i < len(cache.layers) else None
        key, value = (_heads_and_width(getattr(held, name, None)) for name in ("keys", "values"))
        layers.append(Layer(key, value, cast(Any, states.get(i))))
    return Interface(logits, vocab_size, tuple(layers))


def _heads_and_width(cached: Tensor | None) -> tuple[int, int] | None:
    return None if cached is None else (cached.shape[1], cached.shape[3])


def _refuse_other_caches(model: PreTrainedModel, cache: MemoryCache) -> None:
    """
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


_NOT_CARRIED = {
    LinearAttentionCacheLayerMixin: "recurrent or convolutional states",
    DynamicIndexedLayer: "the keys of an indexer",
}


def _traced(model: PreTrainedModel, adapter: DeltaMemAdapter, interface: Interface, options: _Options) -> onnx_ir.Model:
    """The graph, with ONNX Runtime's operators.

    Raises:
        ExportError: PyTorch's exporter has no graph for the model.
    """
    inputs, axes = _sample(interface)
    # Guards that a model's own shape checks leave behind need not hold for the graph: the comparison decides.
    config = OnnxConfig(dynamic_shapes=axes, ort_fusions="cpu", prefer_deferred_runtime_asserts_over_guards=True)
    with _quiet(), use_implementation("onnx"):
        exporter = OnnxExporter()
        step = cast(PreTrainedModel, _Step(model, adapter, options).eval())  # any module will do
        try:
            program = exporter.export(step, inputs, config).program
        except Exception as error:  # torch's exporters have no exception of their own for what they cannot trace
            raise ExportError(
                f"PyTorch cannot trace {type(model).__name__} as one graph for every length.",
                f"{_first_line(error)}.",
                "Run it in PyTorch.",
            ) from error
    _name_axes(program.graph, interface)
    for graph in program.graphs():
        for node in graph:
            node.metadata_props.clear()  # stack traces, with this machine's paths
    return program


def _sample(interface: Interface) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments to trace with, and which of their axes vary. Sizes of 0 and 1 would be taken for constants."""
    sizes = {contract.BATCH: 2, contract.TOKENS: 3, contract.PAST_TOKENS: 4, contract.ALL_TOKENS: 7}
    types = {contract.INT64: torch.int64, contract.BOOL: torch.bool, contract.FLOAT32: torch.float32}
    # The mask's length is the sum of two others, which torch cannot be told: it finds out.
    dims = {name: Dim.DYNAMIC if name == contract.ALL_TOKENS else Dim(name) for name in sizes}
    inputs: dict[str, Any] = {contract.PAST: [{} for _ in interface.layers]}
    axes: dict[str, Any] = {contract.PAST: [{} for _ in interface.layers]}
    for name, (dtype, shape) in interface.inputs().items():
        tensor = torch.ones([sizes[size] if isinstance(size, str) else size for size in shape], dtype=types[dtype])
        vary = {axis: dims[size] for axis, size in enumerate(shape) if isinstance(size, str)}
        if name.startswith(contract.PAST):
            _, layer, part = name.split(".")
            inputs[contract.PAST][int(layer)][part], axes[contract.PAST][int(layer)][part] = tensor, vary
        else:
            inputs[name], axes[name] = tensor, vary
    order = (contract.INPUT_IDS, contract.ATTENTION_MASK, contract.WRITE_MASK, contract.PAST)
    return {name: inputs[name] for name in order}, {name: axes[name] for name in order}


def _name_axes(graph: onnx_ir.Graph, interface: Interface) -> None:
    """Call the varying axes of inputs and outputs what the contract calls them, not s12 or s70."""
    expected = {**interface.inputs(), **interface.outputs()}
    for value in (*graph.inputs, *graph.outputs):
        if value.name in expected and value.shape is not None:
            names = expected[value.name][1]
            if len(names) == len(value.shape):
                found = zip(names, value.shape, strict=True)
                value.shape = onnx_ir.Shape([size if isinstance(size, int) else name for name, size in found])


def _positions(attention_mask: Tensor, tokens: int) -> Tensor:
    """Positions `[B, T]` of the last tokens, counted without padding, as `generate` counts them."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -tokens:]


def _first_line(error: BaseException) -> str:
    """Of what went wrong first, which torch's exporters wrap several times."""
    while error.__cause__ is not None:
        error = error.__cause__
    said = str(error).partition("For more information")[0].strip().partition("\n")[0]
    return f"{type(error).__name__}: {said[:200].rstrip('.!')}"


@dataclass(frozen=True)
class _Call:
    """Inputs of one call of a conversation; masks are over this call's tokens alone."""

    input_ids: Tensor  # [B, T]
    valid: Tensor  # bool [B, T]
    write: Tensor  # bool [B, T]


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
        calls.append(_Call(torch.randint(vocab_size, (batch, tokens), generator=random), valid, writes))
    return calls


@torch.no_grad()
def _largest_difference(model: PreTrainedModel, graph: Graph, options: _Options) -> float:
    """Over the logits of valid positions and the states, of whole conversations, alone and in a batch."""
    differences = []
    for batch in (1, 3):
        cache = MemoryCache(model)
        past = graph.empty_past(batch)
        mask = torch.zeros(batch, 0, dtype=torch.long)
        for call in _conversation(batch, graph.interface.vocab_size):
            mask = torch.cat([mask, call.valid.long()], dim=1)
            cache.write = call.write.to(model.device)
            expected = options.logits(model, call.input_ids.to(model.device), mask.to(model.device), cache).cpu()
            found, past = graph.step(call.input_ids.numpy(), mask.numpy(), call.write.numpy(), past)
            valid = call.valid[:, -1:] if graph.interface.logits == "last" else call.valid
            differences.append((torch.from_numpy(found) - expected)[valid])
            states = cast(MemoryState, cache.memory).layers
            for layer, state in graph.states(past).items():
                differences.append(torch.from_numpy(state) - states[layer].cpu())
    return float(np.max([float(difference.abs().max()) for difference in differences if difference.numel()]))


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Dropout off, and back as it was."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' progress lines (on stdout) and their notes on versions: the check that follows decides."""
    torch_logger = logging.getLogger("torch.onnx")
    level, verbosity = torch_logger.level, transformers_logging.get_verbosity()
    torch_logger.setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    try:
        with redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch_logger.setLevel(level)
        transformers_logging.set_verbosity(verbosity)

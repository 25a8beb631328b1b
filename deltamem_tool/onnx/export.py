"""Write a patched model as an ONNX folder, and compare it with PyTorch before anyone sees it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx_ir
import torch
from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as NotImplementedByRuntime
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.exporters import OnnxExporter

from deltamem_tool.errors import ExportError
from deltamem_tool.files import folder_whole, refuse_existing
from deltamem_tool.onnx import contract, genai
from deltamem_tool.onnx.check import greedy_agreement, half_precision_errors, largest_difference
from deltamem_tool.onnx.contract import Manifest
from deltamem_tool.onnx.fixed import FixedGraph, open_graph
from deltamem_tool.onnx.lean import lean_memories
from deltamem_tool.onnx.optimize import JOIN_WEIGHTS, optimize
from deltamem_tool.onnx.providers import execution_providers
from deltamem_tool.onnx.quantize import memory_weights, quantize_graph
from deltamem_tool.onnx.session import Graph
from deltamem_tool.onnx.standard import check_file, require_standard
from deltamem_tool.onnx.targets import NO_QUANTIZATION, Target, target_of
from deltamem_tool.onnx.trace import CallOptions, dtype_name, interface_of, traced
from deltamem_tool.state import MemoryState
from deltamem_tool.surgery import adapter_of

TOLERANCE = 1e-3  # largest difference between ONNX Runtime and PyTorch in float32, over logits and states
HALF_FACTOR = 2.0  # in half precision: ONNX Runtime's error, over PyTorch's own (measured: 0.6 to 0.8 in float16)
PACKAGES = ("deltamem-tool", "torch", "transformers", "onnx", "onnxscript")


def export_onnx(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    out: str | Path,
    *,
    target: str = "cpu",
    quantize: str = NO_QUANTIZATION,
    logits: str = "last",
    max_length: int = 0,
    memory: str | Path | None = None,
    base_model: str | None = None,
    overwrite: bool = False,
    without: Collection[str] = (),
    progress: Callable[[str], object] | None = None,
) -> Manifest:
    """Write `out`, whole or not at all: graph, weights, manifest, tokenizer, configs. See `contract` for its interface.

    The graph runs conversations through ONNX Runtime and through `model` before the folder takes its name. It is
    quantised after that, and what this costs is measured. Where no runtime here has the operators of the target, the
    manifest has no `max_abs_diff`: nothing was compared.

    Args:
        model: a model with a memory, in the type that the graph shall have.
        tokenizer: its tokenizer; the folder needs a tokenizer.json.
        out: the folder.
        target: a name in `targets.TARGETS`: what will run the graph.
        quantize: how to quantise the base's weights; the memory stays float32.
        logits: "last" for the last position's alone, "all" for every position's.
        max_length: room for so many tokens in keys and values that keep their place; 0 for those that grow.
        memory: a memory file that conversations of a graph for onnxruntime-genai start from; other graphs take the
            state as an input.
        base_model: where the base came from, for the manifest; say nothing that only this machine knows.
        overwrite: replace a folder that is there.
        without: rewrites of the graph to leave out, names in `optimize.REWRITES`.
        progress: called with the name of each stage as it begins.

    Raises:
        ExportError: the model cannot be exported, or ONNX Runtime does not compute what PyTorch computes.
        ConfigError: the target takes no `memory`.
        MemoryStateError: the memory is missing or damaged, or does not fit the adapter.
        DeltaMemError: `out` is there already.
    """
    refuse_existing(out, overwrite)
    for_target = target_of(target, dtype_name(model.dtype), quantize)
    if not tokenizer.is_fast:
        raise ExportError(
            f"{type(tokenizer).__name__} is a slow tokenizer.",
            "It has no tokenizer.json, which the folder needs.",
            "Load the fast one, or convert it with transformers.",
        )
    if quantize != NO_QUANTIZATION:
        without = {*without, *JOIN_WEIGHTS}  # the memory's weights would be quantised with the base's
    tell = progress or (lambda stage: None)
    adapter = adapter_of(model)
    start = None if memory is None else genai.read_start(memory, adapter, for_target)
    with _evaluating(model):
        interface = interface_of(model, adapter, logits, for_target, max_length)
        genai_config = genai.configuration(model, tokenizer, interface) if for_target.genai else None
        options = CallOptions(model, logits, padded_right=for_target.genai)
        with folder_whole(out, overwrite) as staged:
            tell("Tracing the model")
            program = traced(model, adapter, interface, options, for_target, without)
            if for_target.fusions is not None:
                optimize(program, without)
            if genai_config is not None:
                genai.set_defaults(program, interface, start)
            tell("Writing the graph")
            _write_graph(program, staged / contract.MODEL_FILE, for_target, type(model).__name__)
            model.config.save_pretrained(staged)
            model.generation_config.save_pretrained(staged)
            tokenizer.save_pretrained(staged)
            if genai_config is not None:
                genai.write_config(staged, genai_config)
            tell("Comparing ONNX Runtime with PyTorch")
            difference, agreement = _compared(_runnable(staged, interface, for_target), model, options, start), None
            if quantize != NO_QUANTIZATION:  # of a graph that is known to be right
                tell("Quantising")
                weights = memory_weights(adapter, lean_memories(adapter, for_target, without))
                quantize_graph(staged, quantize, weights, interface.vocab_size)
                tell("Measuring what the quantisation costs")
                difference, agreement = _measured(_runnable(staged, interface, for_target), model, options)
            manifest = Manifest(
                adapter=adapter.fingerprint,
                mechanism=adapter.config.to_dict(),
                base_model=base_model,
                model_type=model.config.model_type,
                target=target,
                quantize=quantize,
                interface=interface,
                max_abs_diff=difference,
                greedy_agreement=agreement,
                packages={name: version(name) for name in PACKAGES},
            )
            (staged / contract.MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
            contract.check_folder(staged)
    return manifest


def _write_graph(program: onnx_ir.Model, path: Path, target: Target, model: str) -> None:
    """Write `program`, of which nothing can be used any more afterwards.

    Raises:
        ExportError: it is not what `target` allows.
    """
    if target.standard:
        require_standard(program, model)
    OnnxExporter.save_program(program, path)
    # Give back what the fusions have packed together, more than half of the weights once more: onnxscript's matchers
    # keep nodes that they have looked at, and with them the graph.
    for graph in program.graphs():
        for value in graph.initializers.values():
            value.const_value = None
    gc.collect()
    if target.standard:
        check_file(path)


def _has_cuda() -> bool:
    """Whether ONNX Runtime can use a GPU here: torch may see one that it lacks libraries for."""
    try:
        execution_providers("cuda")
    except ExportError:
        return False
    return torch.cuda.is_available()


def _runnable(folder: Path, interface: contract.Interface, target: Target) -> Graph | FixedGraph | None:
    """The graph on its target's device, or on the CPU where that device is not here; None if the CPU's provider then
    lacks operators for it."""
    on_cuda = target.fusions == "cuda"
    if on_cuda and _has_cuda():
        return open_graph(folder, interface, "cuda")
    try:
        return open_graph(folder, interface, map_weights=True)
    except ExportError as error:
        if on_cuda and isinstance(error.__cause__, NotImplementedByRuntime):
            return None
        raise


def _compared(
    graph: Graph | FixedGraph | None, model: PreTrainedModel, options: CallOptions, start: MemoryState | None = None
) -> float | None:
    """The largest difference of `graph` from `model` in float32; None if it cannot run here.

    Raises:
        ExportError: it is more than rounding.
    """
    if graph is None:
        return None
    if model.dtype == torch.float32:
        difference, allowed = largest_difference(model, graph, options, start), TOLERANCE
    else:
        difference, own = half_precision_errors(model, graph, options)
        allowed = HALF_FACTOR * own
    if not difference <= allowed:  # NaN is no agreement either
        raise ExportError(
            "The graph does not compute what PyTorch computes.",
            f"Logits or states differ by {difference:.2g}; {allowed:.2g} is allowed. Nothing was written.",
            "Please report it, with the base model's name.",
        )
    return difference


def _measured(
    graph: Graph | FixedGraph | None, model: PreTrainedModel, options: CallOptions
) -> tuple[float | None, float | None]:
    """The largest difference of a quantised `graph` from `model` in float32, and its share of the same greedy tokens;
    None if it cannot run here.

    Raises:
        ExportError: it computes something that is no number.
    """
    if graph is None:
        return None, None
    in_float32 = model.dtype == torch.float32
    difference = (
        largest_difference(model, graph, options) if in_float32 else half_precision_errors(model, graph, options)[0]
    )
    if not np.isfinite(difference):
        raise ExportError(
            "The quantised graph computes infinities or no numbers at all.",
            "Before it was quantised it computed what PyTorch computes. Nothing was written.",
            "Export it without --quantize.",
        )
    return difference, greedy_agreement(model, graph, options)


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Dropout off, and back as it was."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)

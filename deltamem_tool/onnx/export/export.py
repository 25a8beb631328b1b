"""Export a model with a memory as an ONNX folder, and compare it with PyTorch before the folder appears."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deltamem_tool._compat import NotImplemented as NotImplementedByRuntime
from deltamem_tool._compat import OnnxExporter
from deltamem_tool.base_model.placement import is_spread
from deltamem_tool.chat.text import ChatText
from deltamem_tool.chat.torch_engine import stop_tokens
from deltamem_tool.errors import ExportError
from deltamem_tool.io.atomic import atomic_folder, check_overwrite
from deltamem_tool.memory.adapter import DeltaMemAdapter
from deltamem_tool.memory.attach import adapter_of
from deltamem_tool.memory.attachment import hf_model
from deltamem_tool.memory.call_options import CallOptions
from deltamem_tool.memory.state import MemoryState
from deltamem_tool.onnx import contract
from deltamem_tool.onnx.contract import Interface
from deltamem_tool.onnx.export import genai
from deltamem_tool.onnx.export.compare import (
    Report,
    greedy_agreement,
    half_precision_errors,
    largest_difference,
    no_report,
    run_in_onnx_runtime,
)
from deltamem_tool.onnx.export.fused_memory import fused_memories
from deltamem_tool.onnx.export.interface import dtype_name, interface_of
from deltamem_tool.onnx.export.portable import check_file, require_standard
from deltamem_tool.onnx.export.quantize import memory_weights, quantize_graph
from deltamem_tool.onnx.export.rewrites import JOIN_WEIGHTS, check_rewrites, optimize
from deltamem_tool.onnx.export.targets import (
    GROUP_SIZE,
    NO_QUANTIZATION,
    Target,
    check_size,
    quantization_of,
    target_of,
)
from deltamem_tool.onnx.export.trace import trace_model
from deltamem_tool.onnx.manifest import Manifest, Quantization
from deltamem_tool.onnx.runtime.buffered_graph import BufferedGraph, open_graph
from deltamem_tool.onnx.runtime.graph import Graph
from deltamem_tool.onnx.runtime.providers import execution_providers

TOLERANCE = 1e-3  # allowed difference between ONNX Runtime and PyTorch in float32, over logits and states
HALF_FACTOR = 2.0  # allowed ratio of its error to PyTorch's own in half precision (measured: 0.6 to 0.8 in float16)
PACKAGES = ("deltamem-tool", "torch", "transformers", "onnx", "onnxscript")

_Graph = Graph | BufferedGraph


def export_onnx(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    out: str | Path,
    *,
    target: str = "cpu",
    quantize: str = NO_QUANTIZATION,
    group_size: int = GROUP_SIZE,
    symmetric: bool | None = None,
    logits: str = "last",
    max_length: int = 0,
    memory: str | Path | None = None,
    base_model: str | None = None,
    overwrite: bool = False,
    without: Collection[str] = (),
    progress: Callable[[str, int, int], object] | None = None,
) -> Manifest:
    """Export a model with a memory as an ONNX folder: graph, weights, manifest, tokenizer and configs.

    The folder is written whole or not at all. `onnx.contract` describes the interface of the graph. Before the folder
    appears, conversations run through both ONNX Runtime and `model`, and the results are compared. Quantisation comes
    after that, and the difference it makes is measured. If no runtime on this machine has the operators of the target,
    nothing is compared, and the manifest has no `max_abs_diff`.

    Args:
        model: a model with a memory, in the data type that the graph is to have.
        tokenizer: its tokenizer; it must have a tokenizer.json.
        out: folder to write.
        target: runtime for the graph, a name in `targets.TARGETS`.
        quantize: "int4" or "int8" to quantise the base model's weights to 4 or 8 bits, "none" not to. The memory stays
            float32.
        group_size: number of quantised weights of one output that share a scale: 16, 32, 64, 128 or 256. It must divide
            the model's width.
        symmetric: quantise without an offset for each of these groups. By default, int8 is symmetric, and int4 is not.
        logits: "last" for the logits of the last position only, "all" for those of every position.
        max_length: fixed length of keys and values, in tokens; 0 lets them grow.
        memory: memory file that conversations start from, for onnxruntime-genai. Other graphs take the state as an
            input.
        base_model: where the base model comes from, for the manifest. Do not pass a path that is only valid on this
            machine.
        overwrite: replace `out` if it exists.
        without: names of graph rewrites in `rewrites.REWRITES` to leave out.
        progress: called with the stage, how much of it is done, and the total (0 if it is not counted), when a stage
            begins and as it progresses.

    Raises:
        ExportError: the model cannot be exported, is spread over devices or is offloaded; ONNX Runtime does not compute
            what PyTorch computes; or `without` contains an unknown name.
        ConfigError: `memory` is given for a target that does not take it.
        MemoryStateError: the memory is missing or damaged, or does not fit the adapter.
        DeltaMemError: `out` already exists.

    Example:
        >>> import deltamem_tool as deltamem
        >>> from transformers import AutoTokenizer
        >>> model = deltamem.load("builtin:adapter")
        >>> tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
        >>> manifest = deltamem.export_onnx(model, tokenizer, "my-onnx")
        >>> manifest.max_abs_diff < 1e-3
        True
    """
    check_overwrite(out, overwrite)
    check_rewrites(without)
    model = hf_model(model)  # a LoRA is in its layers
    for_target = target_of(target, dtype_name(model.dtype), quantize)
    check_size(for_target, model.num_parameters(), dtype_name(model.dtype), quantize)
    width = next(model.get_input_embeddings().parameters()).shape[-1]
    quantization = quantization_of(quantize, group_size, symmetric, width)
    _check_fast(tokenizer)
    _check_in_one_place(model)
    if quantize != NO_QUANTIZATION:
        without = {*without, *JOIN_WEIGHTS}  # the memory's weights would be quantised with the base's
    tell = progress or (lambda stage, done, of: None)
    adapter = adapter_of(model)
    start = None if memory is None else genai.read_start(memory, adapter, for_target)
    with _eval_mode(model):
        options = CallOptions(model, logits, padded_right=for_target.genai)
        interface = interface_of(model, adapter, options, logits, for_target, max_length)
        plan = _Plan(
            model, adapter, interface, options, for_target, quantize, quantization, frozenset(without), start, tell
        )
        genai_config = genai.configuration(model, tokenizer, interface) if for_target.genai else None
        with atomic_folder(out, overwrite) as staged:
            _write_graph(plan, staged / contract.MODEL_FILE)
            _write_configs(plan, staged, tokenizer, genai_config)
            report = plan.stage("Comparing ONNX Runtime with PyTorch")
            difference, agreement = _compare_with_pytorch(plan.opener(staged), model, options, start, report), None
            if quantization is not None:  # of a graph that is known to be right
                difference, agreement = _quantize(plan, quantization, staged)
            manifest = _manifest(plan, base_model, difference, agreement)
            (staged / contract.MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
            contract.check_folder(staged)
    return manifest


@dataclass(frozen=True)
class _Plan:
    """The settings of an export. `without` has all rewrites to leave out."""

    model: PreTrainedModel
    adapter: DeltaMemAdapter
    interface: Interface
    options: CallOptions
    target: Target
    quantize: str
    quantization: Quantization | None
    without: frozenset[str]
    start: MemoryState | None
    tell: Callable[[str, int, int], object]

    def stage(self, name: str) -> Report:
        """Begin a stage, and return the function that reports its progress."""
        self.tell(name, 0, 0)
        return partial(self.tell, name)

    def opener(self, folder: Path, map_weights: bool = True) -> Callable[[], _Graph | None]:
        """Return a function that opens the graph in `folder`."""
        return lambda: _open_if_runnable(folder, self.interface, self.target, map_weights)


def _check_fast(tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that the tokenizer is a fast one.

    Raises:
        ExportError: the tokenizer has no tokenizer.json.
    """
    if not tokenizer.is_fast:
        raise ExportError(
            f"{type(tokenizer).__name__} is a slow tokenizer.",
            "It has no tokenizer.json, which the folder needs.",
            "Load the fast one, or convert it with transformers.",
        )


def _check_in_one_place(model: PreTrainedModel) -> None:
    """Check that all weights are in memory on one device, because a graph holds all of them.

    Raises:
        ExportError: accelerate has spread or offloaded the weights, or processes share them.
    """
    if is_spread(model):
        raise ExportError(
            "The weights of this model are spread over devices or processes, or offloaded.",
            "Tracing a graph needs all of them in one place.",
            "Load the adapter without device_map and distributed_config, on the CPU, as `deltamem export` does.",
        )


def _write_graph(plan: _Plan, path: Path) -> None:
    """Trace the model, rewrite the graph and write it.

    Raises:
        ExportError: the model cannot be traced, or the graph is not allowed for the target.
    """
    plan.stage("Tracing the model")
    program = trace_model(plan.model, plan.adapter, plan.interface, plan.options, plan.target, plan.without)
    optimize(program, plan.target, plan.without)
    if plan.target.genai:
        genai.set_defaults(program, plan.interface, plan.start)
    if plan.target.is_standard:
        require_standard(program, type(plan.model).__name__)
    plan.stage("Writing the graph")
    OnnxExporter.save_program(program, path)
    if plan.target.is_standard:
        check_file(path)


def _write_configs(
    plan: _Plan, folder: Path, tokenizer: PreTrainedTokenizerBase, genai_config: dict[str, Any] | None
) -> None:
    """Write the configs and the tokenizer."""
    plan.model.config.save_pretrained(folder)
    settings = copy.deepcopy(plan.model.generation_config)
    # One list has all tokens that end an answer.
    settings.eos_token_id = sorted(stop_tokens(plan.model, ChatText.from_tokenizer(tokenizer))) or None
    settings.save_pretrained(folder)
    tokenizer = copy.deepcopy(tokenizer)  # truncation and padding of its last call do not belong into the folder
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.save_pretrained(folder)
    if genai_config is not None:
        genai.write_config(folder, genai_config)


def _quantize(plan: _Plan, quantization: Quantization, folder: Path) -> tuple[float | None, float | None]:
    """Quantise the graph in `folder`, and return the errors measured by `_measure_errors`.

    Raises:
        ExportError: the graph cannot be quantised, or computes NaN or infinity afterwards.
    """
    report = plan.stage("Quantising")
    weights = memory_weights(plan.adapter, fused_memories(plan.adapter, plan.target, plan.without))
    quantize_graph(folder, quantization, weights, report)
    # Load without memory-mapping: quantised products are slow unless ONNX Runtime packs their weights.
    return _measure_errors(plan.opener(folder, map_weights=False), plan.model, plan.options, plan.stage)


def _manifest(plan: _Plan, base_model: str | None, difference: float | None, agreement: float | None) -> Manifest:
    return Manifest(
        adapter=plan.adapter.fingerprint,
        mechanism=plan.adapter.config.to_dict(),
        base_model=base_model,
        model_type=plan.model.config.model_type,
        target=plan.target.name,
        quantize=plan.quantize,
        quantization=plan.quantization,
        interface=plan.interface,
        max_abs_diff=difference,
        greedy_agreement=agreement,
        packages={name: version(name) for name in PACKAGES},
    )


def _has_cuda() -> bool:
    """Return whether ONNX Runtime can use a GPU. It may lack libraries for one that PyTorch can use."""
    try:
        execution_providers("cuda")
    except ExportError:
        return False
    return torch.cuda.is_available()


def _open_if_runnable(folder: Path, interface: Interface, target: Target, map_weights: bool = True) -> _Graph | None:
    """Open the graph on its target's device, or on the CPU if that device is missing.

    Return None if the CPU provider then lacks operators of the graph.
    """
    on_cuda = target.fusions == "cuda"
    if on_cuda and _has_cuda():
        return open_graph(folder, interface, "cuda")
    try:
        return open_graph(folder, interface, map_weights=map_weights)
    except ExportError as error:
        if on_cuda and isinstance(error.__cause__, NotImplementedByRuntime):
            return None
        raise


def _compare_with_pytorch(
    open_graph: Callable[[], _Graph | None],
    model: PreTrainedModel,
    options: CallOptions,
    start: MemoryState | None = None,
    report: Report = no_report,
) -> float | None:
    """Return the largest difference between the graph and `model` in float32; None if the graph cannot run here.

    Raises:
        ExportError: the difference is larger than rounding explains.
    """
    differences = _differences(open_graph, model, options, start, report)
    if differences is None:
        return None
    difference, of_pytorch = differences
    allowed = TOLERANCE if of_pytorch is None else HALF_FACTOR * of_pytorch
    if not difference <= allowed:  # also rejects NaN
        raise ExportError(
            "The graph does not compute what PyTorch computes.",
            f"Logits or states differ by {difference:.2g}; {allowed:.2g} is allowed. Nothing was written.",
            "Please report this, with the name of the base model.",
        )
    return difference


def _differences(
    open_graph: Callable[[], _Graph | None],
    model: PreTrainedModel,
    options: CallOptions,
    start: MemoryState | None = None,
    report: Report = no_report,
) -> tuple[float, float | None] | None:
    """Return the largest difference between the graph and `model` in float32; None if the graph cannot run here.

    The second value is the error of `model` itself in half precision; None for a model in float32.
    """
    graph = open_graph()
    if graph is None:
        return None
    if model.dtype == torch.float32:
        return largest_difference(model, graph, options, start, report), None
    outputs = run_in_onnx_runtime(model, graph, report)
    del graph  # frees ONNX Runtime's copy of the weights before PyTorch needs twice their size
    return half_precision_errors(model, outputs, options, report)


def _measure_errors(
    open_graph: Callable[[], _Graph | None],
    model: PreTrainedModel,
    options: CallOptions,
    stage: Callable[[str], Report],
) -> tuple[float | None, float | None]:
    """Return the largest difference between a quantised graph and `model` in float32, and the greedy agreement.

    Both are None if the graph cannot run here.

    Raises:
        ExportError: the graph computes NaN or infinity.
    """
    report = stage("Measuring the quantisation error")
    differences = _differences(open_graph, model, options, report=report)
    if differences is None:
        return None, None
    difference, _ = differences
    if not np.isfinite(difference):
        raise ExportError(
            "The quantised graph computes infinity or NaN.",
            "Before quantisation, it computed what PyTorch computes. Nothing was written.",
            "Export it without --quantize.",
        )
    graph = open_graph()
    assert graph is not None
    return difference, greedy_agreement(model, graph, options, stage("Comparing greedy tokens"))


@contextmanager
def _eval_mode(model: PreTrainedModel) -> Iterator[None]:
    """Turn dropout off and convert the memory's weights to float32, as in the graph, inside the block."""
    training, adapter = model.training, adapter_of(model)
    weights = [(weight, weight.data) for weight in adapter.parameters()]
    model.eval()  # type: ignore[no-untyped-call]  # it has no hints
    adapter.float()
    try:
        yield
    finally:
        for weight, data in weights:
            weight.data = data
        model.train(training)

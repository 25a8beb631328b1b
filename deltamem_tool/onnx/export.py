"""Write a patched model as an ONNX folder, and compare it with PyTorch before anyone sees it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import onnx_ir
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.exporters import OnnxExporter

from deltamem_tool.errors import ExportError
from deltamem_tool.files import folder_whole, refuse_existing
from deltamem_tool.onnx import contract
from deltamem_tool.onnx.check import largest_difference
from deltamem_tool.onnx.contract import Manifest
from deltamem_tool.onnx.fixed import open_graph
from deltamem_tool.onnx.optimize import JOIN_WEIGHTS, optimize
from deltamem_tool.onnx.standard import check_file, require_standard
from deltamem_tool.onnx.targets import NO_QUANTIZATION, target_of
from deltamem_tool.onnx.trace import CallOptions, dtype_name, interface_of, traced
from deltamem_tool.surgery import adapter_of

TOLERANCE = 1e-3  # largest difference between ONNX Runtime and PyTorch, over logits and states
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
    base_model: str | None = None,
    overwrite: bool = False,
    without: Collection[str] = (),
    progress: Callable[[str], object] | None = None,
) -> Manifest:
    """Write `out`, whole or not at all: graph, weights, manifest, tokenizer, configs. See `contract` for its interface.

    The graph runs conversations through ONNX Runtime and through `model` before the folder takes its name.

    Args:
        model: a model with a memory, in the type that the graph shall have.
        tokenizer: its tokenizer; the folder needs a tokenizer.json.
        out: the folder.
        target: a name in `targets.TARGETS`: what will run the graph.
        quantize: how to quantise the base's weights; the memory stays float32.
        logits: "last" for the last position's alone, "all" for every position's.
        max_length: room for so many tokens in keys and values that keep their place; 0 for those that grow.
        base_model: where the base came from, for the manifest; say nothing that only this machine knows.
        overwrite: replace a folder that is there.
        without: rewrites of the graph to leave out, names in `optimize.REWRITES`.
        progress: called with the name of each stage as it begins.

    Raises:
        ExportError: the model cannot be exported, or ONNX Runtime does not compute what PyTorch computes.
        DeltaMemError: `out` is there already.
    """
    refuse_existing(out, overwrite)
    for_target = target_of(target, dtype_name(model.dtype), quantize)
    if quantize != NO_QUANTIZATION:
        without = {*without, *JOIN_WEIGHTS}  # the memory's weights would be quantised with the base's
    tell = progress or (lambda stage: None)
    adapter = adapter_of(model)
    with _evaluating(model):
        interface = interface_of(model, adapter, logits, max_length)
        options = CallOptions(model, logits)
        with folder_whole(out, overwrite) as staged:
            tell("Tracing the model")
            program = traced(model, adapter, interface, options, for_target, without)
            if for_target.fusions is not None:
                optimize(program, without)
            if for_target.standard:
                require_standard(program, type(model).__name__)
            tell("Writing the graph")
            OnnxExporter.save_program(program, staged / contract.MODEL_FILE)
            _release_weights(program)
            if for_target.standard:
                check_file(staged / contract.MODEL_FILE)
            model.config.save_pretrained(staged)
            model.generation_config.save_pretrained(staged)
            tokenizer.save_pretrained(staged)
            tell("Comparing ONNX Runtime with PyTorch")
            difference = largest_difference(model, open_graph(staged, interface, map_weights=True), options)
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
                target=target,
                quantize=quantize,
                interface=interface,
                max_abs_diff=difference,
                packages={name: version(name) for name in PACKAGES},
            )
            (staged / contract.MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
            contract.check_folder(staged)
    return manifest


def _release_weights(program: onnx_ir.Model) -> None:
    """Give back what the fusions have packed together, more than half of the weights once more: onnxscript's matchers
    keep nodes that they have looked at, and with them the graph."""
    for graph in program.graphs():
        for value in graph.initializers.values():
            value.const_value = None
    gc.collect()


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Dropout off, and back as it was."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)

"""The same models as graphs for ONNX Runtime: the memory's as `deltamem export` writes it, the others' beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from deltamem_tool.base_model.tokenizer import tokenizer_of
from deltamem_tool.bench import BASE, LORA, MEMORY, ONNX, PYTORCH
from deltamem_tool.bench.models import equip, refuse_longer, twin_of
from deltamem_tool.bench.setting import Setting
from deltamem_tool.errors import ConfigError, ExportError
from deltamem_tool.memory.adapter import DeltaMemAdapter
from deltamem_tool.memory.attached import hf_model
from deltamem_tool.memory.call_options import CallOptions
from deltamem_tool.onnx.contract import Interface, Manifest
from deltamem_tool.onnx.export.base_graph import without_memory, write_plain
from deltamem_tool.onnx.export.export import export_onnx
from deltamem_tool.onnx.export.quantize import quantize_graph
from deltamem_tool.onnx.export.targets import NO_QUANTIZATION, target_of
from deltamem_tool.onnx.export.trace import dtype_name, interface_of
from deltamem_tool.onnx.locate import find_onnx


@dataclass(frozen=True)
class GraphFolder:
    """Where a graph is, and what it takes and gives."""

    folder: Path
    interface: Interface


def read_export(setting: Setting, name: str, adapter: str) -> tuple[Path, Manifest]:
    """The export called `name`; `adapter` is the fingerprint that it must be of.

    Raises:
        ExportError: it is damaged, of another adapter, of another type than asked for, or for onnxruntime-genai.
        ConfigError: it has no room for the prompts, or is quantised and shall be compared with a LoRA.
    """
    folder = find_onnx(name)
    manifest = Manifest.read(folder)
    interface = manifest.interface
    if manifest.adapter != adapter:
        raise _refused(name, f"is of another adapter: {manifest.adapter[:12]}…, and this is {adapter[:12]}…")
    if interface.genai:
        raise _refused(name, "is for onnxruntime-genai, which runs it by itself")
    if manifest.quantize != NO_QUANTIZATION and (LORA in setting.models or PYTORCH in setting.runtimes):
        raise ConfigError(
            f"{name} is quantised ({manifest.quantize}).",
            "The base's graph beside it would be too, but neither a LoRA's nor PyTorch's model.",
            f"Choose --models {BASE},{MEMORY} --runtimes {ONNX}, or an export that is not quantised.",
        )
    if setting.dtype not in (None, interface.dtype):
        raise _refused(name, f"is of {interface.dtype}, and {setting.dtype} is asked for")
    refuse_longer(setting, interface.max_length, f"{name} has room for {interface.max_length}.")
    return folder, manifest


def _refused(name: str, why: str) -> ExportError:
    next = "Name another export, or none: one is made then."
    return ExportError(f"{name} cannot be compared with.", f"It {why}.", next)


def write_graphs(
    model: PreTrainedModel,
    adapter: DeltaMemAdapter,
    setting: Setting,
    export: tuple[Path, Manifest] | None,
    scratch: Path,
    tell: Callable[[str], object],
) -> dict[str, GraphFolder]:
    """A graph for each of the setting's models, in `scratch` where `export` is not it.

    Args:
        model: the base without its memory, on the CPU.
        adapter: its memory.
        export: from `read_export`.
        scratch: a folder; what is written stays there.
        tell: called with what begins.

    Raises:
        ExportError: the model cannot be exported in this type.
    """
    quantize = export[1].quantize if export else NO_QUANTIZATION
    target = target_of(export[1].target if export else setting.provider, dtype_name(model.dtype), quantize)
    patched = equip(MEMORY, twin_of(model), adapter, setting)
    interface = export[1].interface if export else interface_of(patched, adapter, "last", target)
    options = CallOptions(patched, interface.logits)
    graphs = {}
    for name in setting.models:
        if name == MEMORY and export:
            graphs[name] = GraphFolder(export[0], interface)
            continue
        tell(f"exporting {name}")
        folder = scratch / name
        if name == MEMORY:
            export_onnx(patched, tokenizer_of(model, for_chat=False), folder, target=target.name)
            graphs[name] = GraphFolder(folder, interface)
        else:
            plain = without_memory(interface)
            write_plain(hf_model(equip(name, twin_of(model), adapter, setting)), options, plain, target, folder)
            if quantize != NO_QUANTIZATION:
                quantize_graph(folder, quantize, [], interface.vocab_size)
            graphs[name] = GraphFolder(folder, plain)
    return graphs

"""Prepare the models to compare: the base model alone, with the memory, and with a LoRA, in PyTorch and as graphs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from deltamem_tool.adapter.attach import detach
from deltamem_tool.adapter.load import load
from deltamem_tool.base_model.limits import Limits
from deltamem_tool.base_model.tokenizer import tokenizer_of
from deltamem_tool.baselines.lora import Lora, random_lora
from deltamem_tool.bench import BASE, LORA, MEMORY, ONNX, PYTORCH
from deltamem_tool.bench.setting import Setting
from deltamem_tool.bench.sides import GraphFolder, TorchSide
from deltamem_tool.errors import ConfigError, ExportError
from deltamem_tool.memory.adapter import DeltaMemAdapter
from deltamem_tool.memory.attach import adapter_of, hook
from deltamem_tool.memory.attachment import hf_model
from deltamem_tool.memory.call_options import CallOptions
from deltamem_tool.onnx.export.base_graph import without_memory, write_plain
from deltamem_tool.onnx.export.export import export_onnx
from deltamem_tool.onnx.export.interface import dtype_name, interface_of
from deltamem_tool.onnx.export.quantize import quantize_graph
from deltamem_tool.onnx.export.targets import NO_QUANTIZATION, target_of
from deltamem_tool.onnx.locate import find_onnx
from deltamem_tool.onnx.manifest import Manifest


def load_apart(setting: Setting, dtype: str | None) -> tuple[PreTrainedModel, DeltaMemAdapter]:
    """Load the base model without its memory, and the memory, both on the CPU.

    Raises:
        ConfigError: a prompt and its decoded tokens need more positions than the model has.
        DeltaMemError: as for `deltamem.load`.
    """
    options = {} if dtype is None else {"dtype": getattr(torch, dtype)}
    model = load(setting.adapter, base=setting.base, trust_remote_code=setting.trust_remote_code, **options)
    adapter = adapter_of(model)
    detach(model)
    positions = Limits.from_config(model.config).positions
    setting.check_length(positions, f"The model has {positions} positions.")
    return model, adapter


def shared_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy that shares all weights, so that a memory or a LoRA can be attached to only one of them."""
    shared = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


def modify_model(name: str, model: PreTrainedModel, adapter: DeltaMemAdapter, setting: Setting) -> Any:
    """Change `model` in place into the one called `name`, and return it.

    Raises:
        ConfigError: PEFT is not installed, or a LoRA does not fit the model.
        AdapterError: the LoRA is damaged, or belongs to another base model.
    """
    if name == MEMORY:
        hook(model, adapter)
    if name == LORA and setting.lora is not None:
        return Lora.read(setting.lora).for_inference(model)
    equipped: Any = random_lora(model, adapter, setting.seed) if name == LORA else model
    return equipped.eval()


def torch_sides(model: PreTrainedModel, adapter: DeltaMemAdapter, setting: Setting) -> dict[str, TorchSide]:
    """Return one side for each of the setting's models, with the weights of `model`, on the setting's device."""
    cast(torch.nn.Module, model).to(setting.device)  # transformers hides the signature
    adapter.to(setting.device)
    return {name: TorchSide(modify_model(name, shared_copy(model), adapter, setting)) for name in setting.models}


def vocabulary(model: PreTrainedModel) -> int:
    """Return the number of tokens in the model's vocabulary."""
    return cast(int, model.config.get_text_config(decoder=True).vocab_size)


def read_export(setting: Setting, name: str, adapter: str) -> tuple[Path, Manifest]:
    """Read the export `name`, which must belong to the adapter with the fingerprint `adapter`.

    Raises:
        ExportError: the export is damaged, belongs to another adapter, has another dtype than requested, or is for
            onnxruntime-genai.
        ConfigError: the export has no room for the prompts, or it is quantised and would be compared with a LoRA or
            PyTorch.
    """
    folder = find_onnx(name)
    manifest = Manifest.read(folder)
    interface = manifest.interface
    if manifest.adapter != adapter:
        raise _export_error(name, f"was exported from another adapter: {manifest.adapter[:12]}…, not {adapter[:12]}…")
    if interface.genai:
        raise _export_error(name, "is for onnxruntime-genai, which runs it by itself")
    if manifest.quantize != NO_QUANTIZATION and (LORA in setting.models or PYTORCH in setting.runtimes):
        raise ConfigError(
            f"{name} is quantised ({manifest.quantize}).",
            "The base model's graph is quantised in the same way, but a LoRA's graph and PyTorch's models are not.",
            f"Choose --models {BASE},{MEMORY} --runtimes {ONNX}, or an export that is not quantised.",
        )
    if manifest.quantize != NO_QUANTIZATION and manifest.quantization is None:
        raise _export_error(name, "was quantised by an older version, and does not record how")
    if setting.dtype not in (None, interface.dtype):
        raise _export_error(name, f"has dtype {interface.dtype}, but --dtype is {setting.dtype}")
    setting.check_length(interface.max_length, f"{name} has room for {interface.max_length}.")
    return folder, manifest


def _export_error(name: str, why: str) -> ExportError:
    return ExportError(f"{name} cannot be used for the comparison.", f"It {why}.", "Choose another export, or none.")


def write_graphs(
    model: PreTrainedModel,
    adapter: DeltaMemAdapter,
    setting: Setting,
    export: tuple[Path, Manifest] | None,
    scratch: Path,
    report: Callable[[str], object],
) -> dict[str, GraphFolder]:
    """Write a graph for each model of the setting into `scratch`; that of the memory only if there is no `export`.

    Args:
        model: the base model without its memory, on the CPU.
        adapter: the memory.
        setting: the setting of the benchmark.
        export: result of `read_export`.
        scratch: folder for the graphs, which are kept.
        report: called with the name of each step.

    Raises:
        ExportError: the model cannot be exported in this dtype.
    """
    target = target_of(
        export[1].target if export else setting.provider,
        dtype_name(model.dtype),
        export[1].quantize if export else NO_QUANTIZATION,
    )
    with_memory = modify_model(MEMORY, shared_copy(model), adapter, setting)
    interface = (
        export[1].interface
        if export
        else interface_of(with_memory, adapter, CallOptions(with_memory, "last"), "last", target)
    )
    graphs = {}
    for name in setting.models:
        if name == MEMORY and export:
            graphs[name] = GraphFolder(export[0], interface)
            continue
        report(f"exporting {name}")
        folder = scratch / name
        if name == MEMORY:
            export_onnx(with_memory, tokenizer_of(model, for_chat=False), folder, target=target.name)
            graphs[name] = GraphFolder(folder, interface)
            continue
        plain = without_memory(interface)
        other = hf_model(modify_model(name, shared_copy(model), adapter, setting))
        write_plain(other, CallOptions(with_memory, interface.logits), plain, target, folder)
        if export and export[1].quantization is not None:
            quantize_graph(folder, export[1].quantization, [])
        graphs[name] = GraphFolder(folder, plain)
    return graphs

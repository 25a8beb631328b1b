"""Equal layers are traced once: which layers count as equal, and that copies match PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from base_model.test_export_sweep import patched, tokenizer
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from deltamem_tool import MemoryCache
from deltamem_tool.memory.attach import adapter_of
from deltamem_tool.memory.attachment import hf_model
from deltamem_tool.memory.call_options import CallOptions
from deltamem_tool.onnx.export.export import export_onnx
from deltamem_tool.onnx.export.interface import interface_of
from deltamem_tool.onnx.export.layers import TracedLayers
from deltamem_tool.onnx.export.targets import target_of

TOLERANCE = 1e-4  # float32, sums in another order
DEPTH = 4
SCALE = 0.5


def copies(model: PreTrainedModel) -> dict[int, int]:
    """Maps each layer that would not be traced to the layer that it copies."""
    adapter, options = adapter_of(model), CallOptions(model, "all")
    interface = interface_of(model, adapter, options, "all", target_of("cpu", "float32", "none"))
    ids, mask = torch.full((2, 3), 5), torch.tensor([[1, 1, 1], [0, 1, 1]])
    call = lambda: model(input_ids=ids, attention_mask=mask, cache=MemoryCache(model))  # noqa: E731
    return TracedLayers(model, adapter, interface, call).copies


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    return hf_model(model).model.layers


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        ("llama", {1: 0, 2: 0, 3: 0}),
        ("gemma2", {2: 0, 3: 1}),  # every second layer has a window
        ("smollm3", {1: 0, 2: 0}),  # the last one has no rotary positions
        ("ernie4_5_moe", {2: 1, 3: 1}),  # the first has no experts
        ("diffllama", {}),  # every layer has a constant of its own
        ("longcat_flash", {}),  # two attention modules in each
        ("gemma4_text", {}),  # windows, and keys of other layers
    ],
)
def test_equal_layers_are_found(model_type: str, expected: dict[int, int]):
    assert copies(patched(model_type, DEPTH)) == expected


def hook_on_a_layer(model: PreTrainedModel) -> None:
    layers_of(model)[2].register_forward_hook(lambda module, args, output: output * SCALE)


def hook_on_a_projection(model: PreTrainedModel) -> None:
    linear = layers_of(model)[2].self_attn.v_proj
    linear.register_forward_hook(lambda module, args, output: output * SCALE)


def own_scale(model: PreTrainedModel) -> None:
    layers_of(model)[2].self_attn.scaling *= SCALE


def own_constant(model: PreTrainedModel) -> None:
    for i, layer in enumerate(layers_of(model)):
        layer.mlp.factor = torch.tensor(1.0 + i)
        layer.mlp.forward = lambda x, mlp=layer.mlp: type(mlp).forward(mlp, x) * mlp.factor


def shared_weights(model: PreTrainedModel) -> None:
    layers = layers_of(model)
    layers[2].mlp = layers[0].mlp


CHANGES = [
    (hook_on_a_layer, {1: 0, 3: 0}),
    (hook_on_a_projection, {1: 0, 3: 0}),
    (own_scale, {1: 0, 3: 0}),
    (own_constant, {}),
    (shared_weights, {2: 0, 3: 1}),
]


@pytest.mark.parametrize(("change", "expected"), CHANGES)
def test_layers_that_differ_are_traced_separately(change: Callable[[PreTrainedModel], None], expected: dict[int, int]):
    model = patched("llama", DEPTH)
    change(model)
    assert copies(model) == expected


def test_layers_with_and_without_a_memory_are_traced_separately():
    assert copies(patched("llama", DEPTH, layers=[1, 3])) == {2: 0, 3: 1}


def with_lora(model: PreTrainedModel) -> PreTrainedModel:
    config = LoraConfig(r=2, target_modules=["v_proj"], layers_to_transform=[1, 2], init_lora_weights=False)
    return hf_model(get_peft_model(model, config))


def test_layers_with_and_without_lora_are_traced_separately():
    assert copies(with_lora(patched("llama", DEPTH))) == {2: 1, 3: 0}


@pytest.mark.slow
@pytest.mark.parametrize("change", [change for change, _ in CHANGES])
def test_copied_layers_match_pytorch(change: Callable[[PreTrainedModel], None], tmp_path: Path):
    model = patched("llama", DEPTH)
    change(model)
    assert difference(model, tmp_path) < TOLERANCE


@pytest.mark.slow
def test_copied_layers_with_a_memory_in_some_match_pytorch(tmp_path: Path):
    assert difference(patched("llama", DEPTH, layers=[1, 3]), tmp_path) < TOLERANCE


@pytest.mark.slow
def test_copied_layers_with_lora_in_some_match_pytorch(tmp_path: Path):
    assert difference(with_lora(patched("llama", DEPTH)), tmp_path) < TOLERANCE


def difference(model: PreTrainedModel, folder: Path) -> float:
    """The largest difference from PyTorch over logits and states, as measured by the export."""
    largest = export_onnx(model, tokenizer(), folder / "onnx").max_abs_diff
    assert largest is not None
    return largest

"""Put an adapter on a causal language model with hooks, and take it off.

The base keeps its modules, names and weights, and nothing about a conversation is kept on the model. What runs in a
call of the decoder is in `hooks`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deltamem_tool.base_model.attention import AttentionLayer, attention_layers, layers_at
from deltamem_tool.base_model.layouts import Projection
from deltamem_tool.config import DeltaMemConfig
from deltamem_tool.errors import ArchitectureError
from deltamem_tool.memory.adapter import DeltaMemAdapter
from deltamem_tool.memory.hooks import attention_pre_hook, decoder_hook, decoder_pre_hook, projection_hook
from deltamem_tool.memory.layer import BASE_SLICE_WIDTH
from deltamem_tool.memory.overrides import FORWARD, GENERATION, override, restore
from deltamem_tool.memory.patch import PATCH, Patch, hf_model, patch_of


def fresh_adapter(
    config: DeltaMemConfig,
    layers: Sequence[AttentionLayer],
    first_columns: Callable[[Projection, int], Tensor],
) -> DeltaMemAdapter:
    """Make a new adapter for `layers`, whose modules only have to know their shapes.

    Args:
        config: the mechanism.
        layers: those that get a memory.
        first_columns: returns the first n columns `[out, n]` of a projection's weight; called only where
            `config.delta_init` starts from them.
    """
    adapter = DeltaMemAdapter(config, layers)
    if config.delta_init == "base_slice":
        for layer in layers:
            columns = {branch: first_columns(layer.projection(branch), BASE_SLICE_WIDTH) for branch in config.branches}
            adapter.layer(layer.index).start_from_base(columns)
    return adapter


def unhook(model: PreTrainedModel) -> None:
    """Remove the memory: the hooks are gone, and the base is trainable where it was before."""
    patch: Patch = patch_of(model)
    model = hf_model(model)
    for handle in patch.handles:
        handle.remove()
    for parameter, required_grad in patch.required_grad:
        with torch.inference_mode(parameter.is_inference()):  # torch insists
            parameter.requires_grad_(required_grad)
    delattr(model, PATCH)
    for module, ours in patch.overrides:
        restore(module, ours)


def adapter_of(model: PreTrainedModel) -> DeltaMemAdapter:
    """Return the adapter of a patched model."""
    patch: Patch = patch_of(model)
    return patch.adapter


def hook(model: PreTrainedModel, adapter: DeltaMemAdapter) -> None:
    """Put `adapter` on `model` and freeze the model's own weights."""
    if hasattr(model, PATCH):
        raise ArchitectureError("This model already has a memory.", "", "Call detach(model) first.")
    layers = layers_at(attention_layers(model), adapter.layer_indices)
    # Parameters and not their names, which change where a LoRA comes later.
    required_grad = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    decoder = decoder_of(model)
    handles = [
        decoder.register_forward_pre_hook(decoder_pre_hook(model, decoder, adapter), with_kwargs=True),
        decoder.register_forward_hook(decoder_hook, always_call=True),
    ]
    for layer in layers:
        pre_hook = attention_pre_hook(layer.index, adapter)
        handles.append(layer.module.register_forward_pre_hook(pre_hook, with_kwargs=True))
        for branch in adapter.config.branches:
            projection = layer.projection(branch)
            corrects = projection_hook(layer.index, adapter, branch, projection)
            handles.append(projection.linear.register_forward_hook(corrects))
    overrides = [(cast(nn.Module, model), override(model, GENERATION))]
    if model.base_model not in (model, decoder):  # its own `forward` would rename a cache before the decoder's hook
        overrides.append((model.base_model, override(model.base_model, FORWARD)))
    setattr(model, PATCH, Patch(adapter, handles, required_grad, overrides))


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """Return the module that the model calls with its tokens.

    It is the base model, except in OPT and BART's decoder-only form, whose base models hold nothing but a decoder.
    """
    base = model.base_model
    inner = dict(base.named_children())
    return inner["decoder"] if list(inner) == ["decoder"] else base

"""Attach an adapter to a causal language model with hooks, and detach it.

The base model keeps its modules, names and weights, and the model holds nothing about a conversation. `hooks` has the
code that runs in a call of the decoder.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deltamem_tool._compat import without_compilation
from deltamem_tool.base_model.attention import AttentionLayer, attention_layers, check_heads
from deltamem_tool.base_model.layouts import Projection
from deltamem_tool.base_model.sharding import is_tensor_parallel
from deltamem_tool.config import DeltaMemConfig
from deltamem_tool.errors import ArchitectureError, ConfigError
from deltamem_tool.memory.adapter import DeltaMemAdapter
from deltamem_tool.memory.attachment import ATTACHMENT, Attachment, attachment_of, find_attachment, hf_model
from deltamem_tool.memory.corrections import BASE_SLICE_WIDTH
from deltamem_tool.memory.hooks import hook_decoder, hook_layers
from deltamem_tool.memory.overrides import FORWARD, GENERATION, override, restore


def fresh_adapter(
    config: DeltaMemConfig,
    layers: Sequence[AttentionLayer],
    first_columns: Callable[[Projection, int], Tensor],
) -> DeltaMemAdapter:
    """Make a new adapter for `layers`, whose modules only need to know their shapes.

    Args:
        config: options of the mechanism.
        layers: attention layers that get a memory.
        first_columns: returns the first n columns `[out, n]` of a projection's weight. It is only called if
            `config.delta_init` needs them.
    """
    adapter = DeltaMemAdapter(config, layers)
    if config.delta_init == "base_slice":
        for layer in layers:
            columns = {branch: first_columns(layer.projection(branch), BASE_SLICE_WIDTH) for branch in config.branches}
            adapter.layer(layer.index).start_from_base(columns)
    return adapter


def unhook(model: PreTrainedModel) -> None:
    """Remove the memory and its hooks, and restore which weights of the base model are trainable."""
    attachment = attachment_of(model)
    _undo(attachment)
    vars(hf_model(model)).pop(ATTACHMENT, None)  # it may be a shallow copy of the model that had the memory


def _undo(attachment: Attachment) -> None:
    for handle in (*attachment.handles, *attachment.layer_handles):
        handle.remove()
    attachment.handles.clear()
    for parameter, required_grad in attachment.required_grad:
        if parameter.is_floating_point() or parameter.is_complex():  # others have been quantised since
            with torch.inference_mode(parameter.is_inference()):  # torch insists
                parameter.requires_grad_(required_grad)
    vars(attachment.model).pop(ATTACHMENT, None)
    for module, ours in attachment.overrides:
        restore(module, ours)
    for attention in attachment.made_causal:
        vars(attention)["is_causal"] = False
    _forget_graphs()


def _forget_graphs() -> None:
    """Have torch.compile trace anew: it does not see that a module has other hooks than before."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def adapter_of(model: PreTrainedModel) -> DeltaMemAdapter:
    """Return the adapter of a model with a memory."""
    attachment: Attachment = attachment_of(model)
    return attachment.adapter


def hook(model: PreTrainedModel, adapter: DeltaMemAdapter) -> None:
    """Hook `adapter` into `model` and freeze the model's own weights. If that fails, the model is unchanged.

    Raises:
        ArchitectureError: the model already has a memory, or lacks layers of the adapter.
    """
    if find_attachment(model) is not None:
        raise ArchitectureError("This model already has a memory.", "", "Call detach(model) first.")
    attachment = Attachment(model, adapter, [(parameter, parameter.requires_grad) for parameter in model.parameters()])
    decoder = decoder_of(model)
    try:
        hook_layers(attachment)
        hook_decoder(attachment, decoder)
        _attend_causally(attachment)
        if is_tensor_parallel(model):
            check_heads(model)
            trained = [weight for weight in adapter.parameters() if weight.requires_grad]
            attachment.handles += [weight.register_hook(_refuse_gradient) for weight in trained]  # type: ignore[no-untyped-call]  # torch has no types
        attachment.overrides.append((cast(nn.Module, model), override(model, GENERATION)))
        base = without_compilation(model.base_model)
        if base not in (model, decoder):  # its own `forward` would rename a cache before the decoder's hook
            attachment.overrides.append((base, override(base, FORWARD)))
        model.requires_grad_(False)
        setattr(model, ATTACHMENT, attachment)
        _forget_graphs()
    except BaseException:
        _undo(attachment)
        raise


def _refuse_gradient(gradient: Tensor) -> Tensor:
    """Refuse to train where this gradient is only of what this process has computed of each layer.

    Raises:
        ConfigError: always.
    """
    raise ConfigError(
        "An adapter cannot be trained under tensor parallelism.",
        "Each process would have only the gradients of its own share of every layer.",
        "Shard the base model with FSDP2 instead: training.shard: fsdp2 in a recipe of deltamem train.",
    )


def _attend_causally(attachment: Attachment) -> None:
    """Let no token of a text without padding see later ones, which some models do with SDPA.

    transformers leaves the mask out there, and PaliGemma's attention says that it is not causal: what it sees in both
    directions is marked for it by token types. With them, with padding and without SDPA it is given a mask.
    """
    modules = [layer.module for layer in attention_layers(attachment.model)]
    attachment.made_causal = [module for module in modules if vars(module).get("is_causal") is False]
    for module in attachment.made_causal:
        vars(module)["is_causal"] = True


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """Return the module that the model calls with its tokens.

    This is the base model, except for OPT and the decoder-only form of BART, whose base models only contain a decoder.
    """
    base: nn.Module = without_compilation(model.base_model)
    inner = dict(base.named_children())
    return cast(nn.Module, without_compilation(inner["decoder"])) if list(inner) == ["decoder"] else base

"""Attach a new memory to a causal language model, or detach it."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedModel

from deltamem_tool.adapter.methods import override_methods, unregister
from deltamem_tool.base_model.attention import attention_layers, select_layers
from deltamem_tool.base_model.layouts import Projection
from deltamem_tool.config import DeltaMemConfig
from deltamem_tool.errors import ConfigError
from deltamem_tool.memory.adapter import DeltaMemAdapter
from deltamem_tool.memory.attach import fresh_adapter, hook, unhook
from deltamem_tool.memory.attachment import hf_model


def attach(model: PreTrainedModel, config: DeltaMemConfig | None = None, register: bool = False) -> DeltaMemAdapter:
    """Attach a new memory to `model` and freeze the model's own weights.

    Afterwards, `model.parameters()` and `print(model)` include the adapter, and `model.save_pretrained` and
    `push_to_hub` write the adapter in place of the base model. The base model keeps its state dict and module names.

    Args:
        model: a decoder-only causal language model, or a `PeftModel` of one.
        config: options of the mechanism; by default the paper's token-state write.
        register: register the adapter as the model's submodule `deltamem`, as PEFT does with LoRA layers. The adapter
            is then part of the state dict, of the files that `save_pretrained` writes, and of every wrapper of the
            model, and it is moved and cast with the model.

    Returns:
        The adapter, which has the only trainable parameters.

    Raises:
        ArchitectureError: the model's type does not support a memory, or the model already has one.
        ConfigError: the options do not fit the model.

    Example:
        >>> import deltamem_tool as deltamem
        >>> model = deltamem.load("builtin:adapter")
        >>> deltamem.detach(model)  # the plain base model, as AutoModelForCausalLM.from_pretrained returns it
        >>> adapter = deltamem.attach(model, deltamem.DeltaMemConfig(rank=4))
        >>> adapter.num_parameters() == model.num_parameters(only_trainable=True)
        True
    """
    config, inner = config or DeltaMemConfig(), hf_model(model)
    layers = select_layers(attention_layers(inner), config)
    adapter = fresh_adapter(config, layers, _first_columns)
    hook(inner, adapter)
    try:
        override_methods(model, register)
    except BaseException:
        detach(model)
        raise
    return adapter


def _first_columns(projection: Projection, count: int) -> Tensor:
    weight = projection.weight
    if type(weight) not in (Tensor, nn.Parameter) or not weight.is_floating_point():
        raise ConfigError(
            f"The weight of {projection.name} is quantised.",
            "delta_init=base_slice copies columns of weights that are not quantised.",
            "Use delta_init zero or random, or attach before quantising.",
        )
    return projection.take(weight[:count] if projection.is_transposed else weight[:, :count].T).T


def detach(model: PreTrainedModel) -> None:
    """Remove the memory from `model`, and restore which of its weights are trainable.

    Raises:
        ArchitectureError: the model has no memory.

    Example:
        >>> import deltamem_tool as deltamem
        >>> model = deltamem.load("builtin:adapter")
        >>> deltamem.detach(model)
        >>> all(parameter.requires_grad for parameter in model.parameters())
        True
    """
    unregister(model)
    unhook(model)

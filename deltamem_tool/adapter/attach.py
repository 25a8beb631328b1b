"""Attach a new memory to a causal language model, and detach it."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedModel

from deltamem_tool.adapter.methods import adopt, release
from deltamem_tool.base_model.attention import attention_layers, select_layers
from deltamem_tool.base_model.layouts import Projection
from deltamem_tool.config import DeltaMemConfig
from deltamem_tool.errors import ConfigError
from deltamem_tool.memory.adapter import DeltaMemAdapter
from deltamem_tool.memory.attach import fresh_adapter, hook, unhook
from deltamem_tool.memory.attachment import hf_model


def attach(model: PreTrainedModel, config: DeltaMemConfig | None = None, register: bool = False) -> DeltaMemAdapter:
    """Give `model` a new memory and freeze its own weights.

    `model.parameters()` and `print(model)` then include the adapter, and `model.save_pretrained` and `push_to_hub`
    write it in place of the base model. The base keeps its state dict and the names of its modules.

    Args:
        model: a decoder-only causal language model, or a `PeftModel` of one.
        config: the mechanism; the paper's token-state write by default.
        register: make the adapter the model's submodule `deltamem`, as PEFT makes LoRA layers submodules. It is then
            part of the state dict, of what `save_pretrained` writes, and of every wrapper of the model, and is moved
            and cast with the model.

    Returns:
        The adapter, whose parameters are the only ones that train.

    Raises:
        ArchitectureError: the model is of a type that cannot have a memory, or has one.
        ConfigError: the options do not fit the model.

    Example:
        >>> import deltamem_tool as deltamem
        >>> model = deltamem.load("builtin:adapter")
        >>> deltamem.detach(model)  # now it is as AutoModelForCausalLM.from_pretrained returns it
        >>> adapter = deltamem.attach(model, deltamem.DeltaMemConfig(rank=4))
        >>> adapter.num_parameters() == model.num_parameters(only_trainable=True)
        True
    """
    config, inner = config or DeltaMemConfig(), hf_model(model)
    layers = select_layers(attention_layers(inner), config)
    adapter = fresh_adapter(config, layers, _first_columns)
    hook(inner, adapter)
    try:
        adopt(model, register)
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
    """Remove the memory: the base is as it was before, and trainable where it was.

    Raises:
        ArchitectureError: the model has no memory.

    Example:
        >>> import deltamem_tool as deltamem
        >>> model = deltamem.load("builtin:adapter")
        >>> deltamem.detach(model)
        >>> all(parameter.requires_grad for parameter in model.parameters())
        True
    """
    release(model)
    unhook(model)

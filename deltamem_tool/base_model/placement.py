"""The placement of a model that accelerate has spread over devices, or offloaded to CPU or disk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from deltamem_tool._compat import accelerate_hooks
from deltamem_tool.base_model.sharding import is_split


def input_device(model: PreTrainedModel) -> torch.device:
    """Return the device for the tokens of `model`: that of its first weights, also if these are offloaded."""
    device = model.device
    if device.type != "meta":
        return device
    embedding = model.get_input_embeddings()
    devices = [getattr(hook, "execution_device", None) for hook in accelerate_hooks(embedding)]
    return next((torch.device(place) for place in devices if place is not None), device)


def is_spread(model: nn.Module) -> bool:
    """Return whether accelerate moves weights or hidden states of `model`, or processes share its weights."""
    hooked = any(accelerate_hooks(module) for module in model.modules())
    return hooked or any(is_split(weight) for weight in model.parameters())


@contextmanager
def load_offloaded(module: nn.Module) -> Iterator[None]:
    """Keep the weights of `module` itself on the device where it runs inside the block, also offloaded ones."""
    hooks = accelerate_hooks(module)
    for hook in hooks:
        hook.pre_forward(module)
    try:
        yield
    finally:
        for hook in hooks:
            hook.post_forward(module, None)

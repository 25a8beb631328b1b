"""Static adapters for evaluation tests."""

from __future__ import annotations

import torch

from deltamem_tool.adapter.find_base import base_of_model
from deltamem_tool.base_model.attention import attention_layers
from deltamem_tool.baselines.static import StaticAdapter


def shaken(adapter, seed=0):
    """Gives the adapter random weights that change the model's output."""
    torch.manual_seed(seed)
    for weight in adapter.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    return adapter


def make_static(model, config, folder, seed=0):
    """A static adapter for a model with a memory, as `deltamem train` saves it."""
    adapter = shaken(StaticAdapter(config, attention_layers(model)), seed)
    adapter.save(folder, base_of_model(model), False, {})
    return folder

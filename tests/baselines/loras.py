"""LoRAs for evaluation tests."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM

from deltamem_tool.baselines.lora import new_lora
from deltamem_tool.recipe.load import LoraOptions


def make_lora(base, folder, seed=0, name=None):
    """A LoRA with random weights, as `deltamem train` saves it."""
    torch.manual_seed(seed)
    tuned = new_lora(AutoModelForCausalLM.from_pretrained(base), LoraOptions(rank=2), str(name or base))
    for weight in (p for p in tuned.parameters() if p.requires_grad):
        torch.nn.init.normal_(weight, std=0.5)
    tuned.save_pretrained(folder)
    return folder

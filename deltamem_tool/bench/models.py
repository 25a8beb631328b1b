"""The models that are compared, in PyTorch: the base, the base with the memory, the base with a LoRA."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from deltamem_tool.adapter.load import load
from deltamem_tool.baselines.lora import Lora, random_lora
from deltamem_tool.bench import LORA, MEMORY
from deltamem_tool.bench.setting import Setting
from deltamem_tool.bench.sides import TorchSide
from deltamem_tool.errors import ConfigError
from deltamem_tool.memory.adapter import DeltaMemAdapter
from deltamem_tool.memory.attach import adapter_of, detach, hook


def load_apart(setting: Setting, dtype: str | None) -> tuple[PreTrainedModel, DeltaMemAdapter]:
    """The base model without its memory, and the memory, both on the CPU.

    Raises:
        ConfigError: a prompt and what is decoded after it are longer than the model's positions.
        DeltaMemError: as `deltamem.load`.
    """
    options = {} if dtype is None else {"dtype": getattr(torch, dtype)}
    model = load(setting.adapter, base=setting.base, trust_remote_code=setting.trust_remote_code, **options)
    adapter = adapter_of(model)
    detach(model)
    positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    refuse_longer(setting, positions, f"The model has {positions} positions.")
    return model, adapter


def refuse_longer(setting: Setting, room: int | None, why: str) -> None:
    """
    Raises:
        ConfigError: a prompt and what is decoded after it are more than `room` tokens.
    """
    needed = max(setting.prompts) + setting.decode
    if room and needed > room:
        raise ConfigError(
            f"A prompt of {max(setting.prompts)} tokens and {setting.decode} decoded ones are too long.",
            why,
            f"Choose prompts of at most {room - setting.decode} tokens, or decode fewer."
            if room > setting.decode
            else "Decode fewer tokens.",
        )


def twin_of(model: PreTrainedModel) -> PreTrainedModel:
    """Another model with the same weights: what is put on one of them is not on the other, and nothing is twice in
    memory."""
    shared = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


def equip(name: str, model: PreTrainedModel, adapter: DeltaMemAdapter, setting: Setting) -> Any:
    """`model`, changed in place into the one called `name`.

    Raises:
        ConfigError: PEFT is not installed, or a LoRA does not fit the model.
        AdapterError: the LoRA is damaged, or of another base model.
    """
    if name == MEMORY:
        hook(model, adapter)
    if name != LORA:
        return model.eval()
    if setting.lora is not None:
        return Lora.read(setting.lora).for_inference(model)
    return random_lora(model, adapter, setting.seed).eval()


def torch_sides(model: PreTrainedModel, adapter: DeltaMemAdapter, setting: Setting) -> dict[str, TorchSide]:
    """One for each of the setting's models, all with the weights of `model`, on the setting's device."""
    cast(torch.nn.Module, model).to(setting.device)  # transformers hides the signature
    adapter.to(setting.device)
    return {name: TorchSide(equip(name, twin_of(model), adapter, setting)) for name in setting.models}


def vocabulary(model: PreTrainedModel) -> int:
    return model.config.get_text_config(decoder=True).vocab_size

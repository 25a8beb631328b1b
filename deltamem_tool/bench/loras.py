"""The LoRA baseline, measured: one of PEFT's folders, or a fresh one of the memory's size.

`training.lora` trains it, `evaluation.lora` asks it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deltamem_tool.base_model.attention import attention_layers
from deltamem_tool.base_model.layouts import features
from deltamem_tool.errors import AdapterError
from deltamem_tool.evaluation.lora import CONFIG_FILE, WEIGHTS_FILE, Lora
from deltamem_tool.io.names import BUILTIN, hub_name, resolve_folder
from deltamem_tool.memory.adapter import DeltaMemAdapter
from deltamem_tool.recipe.load import LoraOptions

BRANCHES = ("q", "o")  # what a fresh LoRA corrects, as the paper's memory does
FRESH_STD = 0.02  # of the weights that PEFT begins with at zero: a product with zeros might be left out


def fresh_lora(model: PreTrainedModel, adapter: DeltaMemAdapter, seed: int) -> Any:
    """A `PeftModel` with random weights on the layers that the memory is in, of the rank whose number of parameters is
    next to the memory's.

    Raises:
        ConfigError: PEFT is not installed, or cannot change these layers.
    """
    from deltamem_tool.training.lora import with_lora

    layers = [layer for layer in attention_layers(model) if layer.index in adapter.layer_indices]
    linears = {
        layer.projection(branch).name: layer.projection(branch).linear for layer in layers for branch in BRANCHES
    }
    of_rank_one = sum(sum(features(linear)) for linear in linears.values())
    parameters = sum(parameter.numel() for parameter in adapter.parameters())
    rank = max(1, round(parameters / of_rank_one))
    generator = torch.Generator().manual_seed(seed)
    with _quiet():
        lora = with_lora(model, LoraOptions(rank=rank, targets=tuple(linears)))
    with torch.no_grad():
        for parameter in _weights_of(lora):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * FRESH_STD)
    return _in_type_of_base(lora)


def find_lora(name: str, bases: Sequence[str] = ()) -> Lora:
    """The LoRA of a PEFT folder or Hub id, looked at without the base model, whose names are `bases`.

    Raises:
        AdapterError: a file is missing or damaged, it is no LoRA, or it names another base model.
        HubError: it is not there.
    """
    lora = Lora.read(resolve_folder(name, None, [CONFIG_FILE, WEIGHTS_FILE], "LoRA"))
    # A path says nothing on another machine; of two names that anybody can look up, one is not the other.
    if isinstance(lora.base, str) and bases and all(map(_is_public, (lora.base, *bases))) and lora.base not in bases:
        raise AdapterError(
            f"{name} was made for another base model.",
            f"It was made for {lora.base}, and this is {bases[0]}.",
            "Give a LoRA of the same base model.",
        )
    return lora


def stored_lora(model: PreTrainedModel, name: str) -> Any:
    """The `PeftModel` of a PEFT folder or Hub id.

    Raises:
        ConfigError: PEFT is not installed.
        AdapterError: as `find_lora`; or it does not fit the model.
        HubError: it is not there.
    """
    with _quiet():
        return _in_type_of_base(find_lora(name).put_on(model))


def _is_public(name: str) -> bool:
    """Whether it is no path on this machine."""
    return name.startswith(BUILTIN) or hub_name(name) is not None


def import_peft() -> None:
    """Have in the process all that making a LoRA imports. PEFT itself does so when it makes a first one, for every kind
    of layer; and what makes ours is beside the training."""
    import peft

    import deltamem_tool.training.lora  # noqa: F401

    with _quiet():
        peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["0"]), nn.Sequential(nn.Linear(1, 1)))


def lora_parameters(lora: Any) -> int:
    return sum(parameter.numel() for parameter in _weights_of(lora))


def _weights_of(lora: Any) -> Iterator[Tensor]:
    return (parameter for name, parameter in lora.named_parameters() if "lora_" in name)


def _in_type_of_base(lora: Any) -> Any:
    """PEFT keeps a LoRA of a half-precision model in float32, for training, and casts at every call."""
    for parameter in _weights_of(lora):
        parameter.data = parameter.data.to(lora.get_base_model().dtype)
    return lora.requires_grad_(False)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without PEFT's warnings, such as those of what it uses of transformers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield

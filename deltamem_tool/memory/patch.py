"""The patch that `attach` puts on a model."""

from __future__ import annotations

from dataclasses import dataclass
from types import MethodType

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from deltamem_tool._compat import without_compilation
from deltamem_tool.errors import ArchitectureError
from deltamem_tool.memory.adapter import DeltaMemAdapter

PATCH = "_deltamem_patch"  # the attribute of the model


@dataclass
class Patch:
    """All that `detach` has to undo."""

    adapter: DeltaMemAdapter
    handles: list[RemovableHandle]
    required_grad: list[tuple[nn.Parameter, bool]]
    overrides: list[tuple[nn.Module, dict[str, MethodType]]]  # methods that were set on modules, by name


def hf_model(model: PreTrainedModel) -> PreTrainedModel:
    """Return the transformers model inside what PEFT and torch.compile make of it, which is where hooks go.

    Raises:
        ArchitectureError: it is not a model of transformers, or a PEFT model of prompt learning, which fills the cache
            with a learned prompt.
    """
    model = without_compilation(model)
    if isinstance(model, PreTrainedModel):
        return model
    if not hasattr(model, "get_base_model"):
        raise ArchitectureError(
            f"A {type(model).__name__} cannot have a memory.",
            "It is not a model of transformers.",
            "Pass what AutoModelForCausalLM.from_pretrained returns, or PEFT or torch.compile make of it.",
        )
    if model.active_peft_config.is_prompt_learning:
        raise ArchitectureError(
            f"A model with {model.active_peft_config.peft_type.value} cannot take a memory.",
            "PEFT puts its learned prompt into a cache of its own, which cannot hold a memory.",
            "Use an adapter that changes layers, such as LoRA, or the model without it.",
        )
    return hf_model(model.get_base_model())


def patch_of(model: PreTrainedModel) -> Patch:
    """Return the patch of a model.

    Raises:
        ArchitectureError: the model has no memory.
    """
    patch: Patch | None = getattr(hf_model(model), PATCH, None)
    if patch is None:
        raise ArchitectureError(
            "This model has no memory.", "", "Call deltamem.attach(model) or deltamem.load(...) first."
        )
    return patch

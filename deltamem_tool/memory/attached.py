"""What `attach` has put on a model, and where the model keeps it."""

from __future__ import annotations

from dataclasses import dataclass
from types import MethodType

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

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
    """The transformers model inside of PEFT's, LoRA and all, which is where hooks go; any other model itself.

    Raises:
        ArchitectureError: PEFT fills the cache with a learned prompt.
    """
    if isinstance(model, PreTrainedModel) or not hasattr(model, "get_base_model"):
        return model
    if model.active_peft_config.is_prompt_learning:
        raise ArchitectureError(
            f"A model with {model.active_peft_config.peft_type.value} takes no memory.",
            "Its learned prompt comes in a cache of PEFT's own, which has no place for a memory.",
            "Use an adapter that changes layers, such as LoRA, or the model without it.",
        )
    return model.get_base_model()


def patch_of(model: PreTrainedModel) -> Patch:
    """What `attach` has put on a model.

    Raises:
        ArchitectureError: it has none.
    """
    patch = getattr(hf_model(model), PATCH, None)
    if patch is None:
        raise ArchitectureError(
            "This model has no memory.", "", "Call deltamem.attach(model) or deltamem.load(...) first."
        )
    return patch

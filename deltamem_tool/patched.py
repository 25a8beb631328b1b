"""Where a patched model keeps what `attach` has put on it: all that a state has to know of `surgery`."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from deltamem_tool.errors import ArchitectureError

PATCH = "_deltamem_patch"  # the attribute of the model


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


def patch_of(model: PreTrainedModel) -> Any:
    """The `surgery.Patch` of a patched model.

    Raises:
        ArchitectureError: it has none.
    """
    patch = getattr(hf_model(model), PATCH, None)
    if patch is None:
        raise ArchitectureError(
            "This model has no memory.", "", "Call deltamem.attach(model) or deltamem.load(...) first."
        )
    return patch

"""The record that `attach` keeps on a model."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from deltamem_tool._compat import child_of, without_compilation
from deltamem_tool.errors import ArchitectureError
from deltamem_tool.memory.adapter import DeltaMemAdapter

ATTACHMENT = "_deltamem_attachment"  # the attribute of the model


@dataclass
class Attachment:
    """Everything that `detach` has to undo."""

    model: PreTrainedModel
    adapter: DeltaMemAdapter
    # Parameters and not their names, which change where a LoRA comes later.
    required_grad: list[tuple[nn.Parameter, bool]]
    handles: list[RemovableHandle] = field(default_factory=list)  # of the decoder's hooks
    layer_handles: list[RemovableHandle] = field(default_factory=list)
    # What leads from the model to the modules of these hooks: parent, name and child.
    path: list[tuple[nn.Module, str, nn.Module]] = field(default_factory=list)
    overrides: list[tuple[nn.Module, dict[str, MethodType]]] = field(default_factory=list)  # what was set, by name
    made_causal: list[nn.Module] = field(default_factory=list)  # attention that said that it is not

    @property
    def has_moved(self) -> bool:
        """Return whether another module has replaced a hooked one. PEFT and others replace layers and put them back."""
        return any(child_of(parent, name) is not child for parent, name, child in self.path)

    def __reduce__(self) -> str | tuple[Any, ...]:
        raise ArchitectureError(
            "A model with a memory cannot be pickled.",
            "Methods that were set on it would be lost, and with them its memory.",
            "Save the adapter with deltamem.save_adapter, and load it with deltamem.load.",
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Attachment:
        copied = memo[id(self)] = object.__new__(Attachment)
        vars(copied).update(copy.deepcopy(vars(self), memo))
        return copied


def hf_model(model: PreTrainedModel) -> PreTrainedModel:
    """Return the transformers model inside the wrappers of PEFT and torch.compile. Hooks go onto that model.

    Raises:
        ArchitectureError: it is not a transformers model; or it is a PEFT model of prompt learning, which fills the
            cache with a learned prompt.
    """
    model = without_compilation(model)
    if isinstance(model, PreTrainedModel):
        return model
    if not hasattr(model, "get_base_model"):
        raise ArchitectureError(
            f"A {type(model).__name__} cannot have a memory.",
            "It is not a model of transformers.",
            "Pass a model from AutoModelForCausalLM.from_pretrained, also one wrapped by PEFT or torch.compile.",
        )
    if model.active_peft_config.is_prompt_learning:
        raise ArchitectureError(
            f"A model with {model.active_peft_config.peft_type.value} cannot take a memory.",
            "PEFT puts its learned prompt into a cache of its own, which cannot hold a memory.",
            "Use an adapter that changes layers, such as LoRA, or the model without it.",
        )
    return hf_model(model.get_base_model())


def find_attachment(model: PreTrainedModel) -> Attachment | None:
    """Return the attachment of a model; None if it has no memory, or shares its layers with a detached model."""
    attachment: Attachment | None = getattr(hf_model(model), ATTACHMENT, None)
    return attachment if attachment is not None and attachment.handles else None


def attachment_of(model: PreTrainedModel) -> Attachment:
    """Return the attachment of a model.

    Raises:
        ArchitectureError: the model has no memory.
    """
    attachment = find_attachment(model)
    if attachment is None:
        raise ArchitectureError(
            "This model has no memory.", "", "Call deltamem.attach(model) or deltamem.load(...) first."
        )
    return attachment

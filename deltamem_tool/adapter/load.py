"""Load an adapter folder onto its base model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from deltamem_tool.adapter.find_base import find_base
from deltamem_tool.adapter.folder import AdapterFolder, describe_adapter, with_tensors
from deltamem_tool.adapter.methods import override_methods
from deltamem_tool.base_model.attention import attention_layers, select_layers
from deltamem_tool.memory.adapter import DeltaMemAdapter
from deltamem_tool.memory.attach import hook


def load(
    path: str | Path,
    base: str | None = None,
    revision: str | None = None,
    base_revision: str | None = None,
    trust_remote_code: bool = False,
    register: bool = False,
    allow_other_base: bool = False,
    **kwargs: Any,
) -> PreTrainedModel:
    """Load an adapter and its base model, and return the model with its memory, in eval mode.

    Args:
        path: adapter folder or Hub id.
        base: folder or Hub id of the base model; by default the one recorded in the adapter.
        revision: branch, tag or commit of the adapter on the Hub.
        base_revision: branch, tag or commit of the base model on the Hub; by default the recorded one, if the base
            model is the recorded one too.
        trust_remote_code: allow the base model to run its own Python files.
        register: register the adapter as the model's submodule `deltamem`, as in `attach`.
        allow_other_base: allow a base model other than the one the adapter was made for, such as the checkpoint that a
            GGUF file was quantised from. Its shapes must fit; an `OtherBaseWarning` is issued.
        kwargs: passed to `AutoModelForCausalLM.from_pretrained`.

    Raises:
        AdapterError: the adapter is damaged or was made for another base model.
        ArchitectureError: the base model cannot be loaded.
        HubError: the adapter or the base model does not exist, or the Hub cannot be reached.

    Example:
        >>> import deltamem_tool as deltamem
        >>> model = deltamem.load("builtin:adapter", dtype="float32")
        >>> model.config.model_type
        'qwen3'
        >>> model.training
        False
    """
    described = describe_adapter(path, revision)
    checkpoint, actual_base = find_base(path, described.base, base, base_revision, trust_remote_code, allow_other_base)
    with torch.device("meta"):
        expected = DeltaMemAdapter(described.config, select_layers(checkpoint.layers, described.config))
    described.check_shapes(shapes_of(expected))
    folder = with_tensors(described)
    model = checkpoint.load(**kwargs)
    adapter = DeltaMemAdapter(folder.config, select_layers(attention_layers(model), folder.config))
    load_weights(adapter, folder)
    adapter.made_for = actual_base
    hook(model, adapter)
    override_methods(model, register)
    model.eval()  # type: ignore[no-untyped-call]  # transformers has no types
    return model


def load_weights(adapter: DeltaMemAdapter, folder: AdapterFolder) -> None:
    """Load the folder's weights into `adapter`.

    Raises:
        AdapterError: tensors are missing, extra or misshapen for this base model; all of them are named.
    """
    folder.check_shapes(shapes_of(adapter))
    adapter.load_state_dict({name: torch.tensor(weight) for name, weight in folder.numbers().items()})


def shapes_of(adapter: DeltaMemAdapter) -> dict[str, Sequence[int]]:
    """Return the shape of every weight by its name in the file."""
    return {name: tensor.shape for name, tensor in adapter.state_dict().items()}

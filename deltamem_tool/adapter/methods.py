"""Model methods that list parameters and save the model, extended to include the adapter."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from deltamem_tool._compat import without_compilation
from deltamem_tool.adapter.find_base import base_of_model
from deltamem_tool.adapter.save import save_beside
from deltamem_tool.memory.attachment import attachment_of, find_attachment, hf_model
from deltamem_tool.memory.overrides import Method, Methods, override

MODULE = "deltamem"  # name of the adapter among a model's modules and parameters


def override_methods(model: PreTrainedModel, register: bool = False) -> None:
    """Make a model with a memory list and save the adapter.

    Args:
        model: the model with a memory, or a `PeftModel` of it.
        register: make the adapter a submodule, so that torch's own methods find its parameters.
    """
    attachment, inner = attachment_of(model), hf_model(model)
    if register:
        cast(nn.Module, inner).add_module(MODULE, attachment.adapter)
    outer = without_compilation(model)  # torch's wrapper passes attributes on to the model inside
    for module in {id(module): cast(nn.Module, module) for module in (inner, outer)}.values():
        attachment.overrides.append((module, override(module, SAVING if register else {**SHOWING, **SAVING})))


def unregister(model: PreTrainedModel) -> None:
    """Remove the adapter from the submodules, if it is one."""
    adapter, inner = attachment_of(model).adapter, hf_model(model)
    if getattr(inner, MODULE, None) is adapter:
        delattr(inner, MODULE)


def _with_parameters(original: Method) -> Method:
    """Include the adapter's parameters in the model's.

    `parameters`, `zero_grad`, `requires_grad_` and `num_parameters` use this method. Without `recurse`, a module lists
    only its own parameters, and accelerate offloads these. DistributedDataParallel also calls it that way, to find all
    parameters that the processes share.
    """

    @functools.wraps(original)
    def named_parameters(
        self: nn.Module, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        yield from original(self, prefix, recurse, remove_duplicate)
        attachment = find_attachment(cast(PreTrainedModel, self))
        # A shallow copy of a model keeps these methods after the model is detached.
        if attachment is not None and (recurse or torch.distributed.is_initialized()):
            name = f"{prefix}.{MODULE}" if prefix else MODULE
            yield from attachment.adapter.named_parameters(name, True, remove_duplicate)

    return named_parameters


def _with_adapter(original: Method) -> Method:
    """Print a line about the adapter before the model's modules."""

    @functools.wraps(original)
    def extra_repr(self: nn.Module) -> str:
        attachment = find_attachment(cast(PreTrainedModel, self))
        lines = [original(self)]
        if attachment is not None:
            adapter = attachment.adapter
            lines.append(f"({MODULE}): {type(adapter).__name__}({adapter.extra_repr()})")
        return "\n".join(filter(None, lines))

    return extra_repr


def _with_adapter_folder(original: Method) -> Method:
    """Write the adapter in place of the base model.

    Other files are written beside it: a LoRA, a state dict that includes the adapter, a base model not saved elsewhere.
    """

    @functools.wraps(original)
    def save_pretrained(
        self: PreTrainedModel,
        save_directory: str | Path,
        is_main_process: bool = True,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        inner = hf_model(self)
        if find_attachment(self) is None:
            original(self, save_directory, is_main_process=is_main_process, push_to_hub=push_to_hub, **kwargs)
            return
        base = base_of_model(inner)
        if self is not inner or hasattr(inner, MODULE) or hasattr(inner, "peft_config") or not base.name:
            original(self, save_directory, is_main_process=is_main_process, **kwargs)
        if is_main_process:
            save_beside(attachment_of(self).adapter, base, save_directory)
            if push_to_hub:
                repository = kwargs.pop("repo_id", Path(save_directory).name)
                options = {name: kwargs[name] for name in _OF_PUSHING & kwargs.keys()}
                self.push_to_hub(repository, **options)  # calls this method with a temporary folder

    return save_pretrained


_OF_PUSHING = {"commit_message", "commit_description", "private", "token", "revision", "create_pr", "tags"}
SHOWING: Methods = {"named_parameters": _with_parameters, "extra_repr": _with_adapter}
SAVING: Methods = {"save_pretrained": _with_adapter_folder}

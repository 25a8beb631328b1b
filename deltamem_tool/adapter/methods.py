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

MODULE = "deltamem"  # what the adapter is called among a model's modules and parameters


def adopt(model: PreTrainedModel, register: bool = False) -> None:
    """Let a model with a memory show and save the adapter.

    Args:
        model: it, or a `PeftModel` of it.
        register: make the adapter a submodule; torch's own methods then find its parameters.
    """
    attachment, inner = attachment_of(model), hf_model(model)
    if register:
        cast(nn.Module, inner).add_module(MODULE, attachment.adapter)
    outer = without_compilation(model)  # torch's own wrapper takes attributes for those of the model in it
    for module in {id(module): cast(nn.Module, module) for module in (inner, outer)}.values():
        attachment.overrides.append((module, override(module, SAVING if register else {**SHOWING, **SAVING})))


def release(model: PreTrainedModel) -> None:
    """Make the adapter no submodule, if it is one."""
    adapter, inner = attachment_of(model).adapter, hf_model(model)
    if getattr(inner, MODULE, None) is adapter:
        delattr(inner, MODULE)


def _with_parameters(original: Method) -> Method:
    """Make the adapter's parameters the model's own.

    `parameters`, `zero_grad`, `requires_grad_` and `num_parameters` go by this method. Without `recurse` every module
    has its own alone, which is what accelerate offloads; DistributedDataParallel, for which there are processes, asks
    that way for all that it shall share.
    """

    @functools.wraps(original)
    def named_parameters(
        self: nn.Module, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        yield from original(self, prefix, recurse, remove_duplicate)
        attachment = find_attachment(cast(PreTrainedModel, self))
        # A shallow copy of a model that has been detached keeps the methods.
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

    What else is written then comes beside it: a LoRA, a state dict with the adapter in it, a base that is nowhere else.
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
                self.push_to_hub(repository, **options)  # which calls this method, in a folder of its own

    return save_pretrained


_OF_PUSHING = {"commit_message", "commit_description", "private", "token", "revision", "create_pr", "tags"}
SHOWING: Methods = {"named_parameters": _with_parameters, "extra_repr": _with_adapter}
SAVING: Methods = {"save_pretrained": _with_adapter_folder}

"""Write an adapter folder, whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import save
from transformers import PreTrainedModel

from deltamem_tool._version import __version__
from deltamem_tool.adapter.config_file import CONFIG_FILE, FORMAT, FORMAT_VERSION, WEIGHTS_FILE, BaseModel
from deltamem_tool.adapter.find_base import base_of_model
from deltamem_tool.errors import AdapterError
from deltamem_tool.io.atomic import folder_whole, resolve
from deltamem_tool.memory.adapter import DeltaMemAdapter
from deltamem_tool.memory.attach import adapter_of
from deltamem_tool.memory.patch import hf_model


def save_adapter(
    model: PreTrainedModel, path: str | Path, overwrite: bool = False, files: Mapping[str, bytes] | None = None
) -> None:
    """Write the adapter of a patched `model` as a folder, whole or not at all, with `files` beside it.

    Example:
        >>> import deltamem_tool as deltamem
        >>> model = deltamem.load("builtin:adapter")
        >>> deltamem.save_adapter(model, "my-adapter")
        >>> deltamem.load("my-adapter").config.model_type
        'qwen3'
    """
    write_adapter(adapter_of(model), base_of_model(hf_model(model)), path, overwrite, files=files)


def write_adapter(
    adapter: DeltaMemAdapter,
    base: BaseModel,
    out: str | Path,
    overwrite: bool,
    reference: Mapping[str, Any] | None = None,
    files: Mapping[str, bytes] | None = None,
) -> None:
    """Write the folder.

    Args:
        adapter: what to write.
        base: the model it was made for.
        out: the folder.
        overwrite: replace it if it exists.
        reference: goes into the config as it is, for the way back to the reference's format.
        files: contents by name, written beside.

    Raises:
        AdapterError: the adapter contains NaN or infinity, or `out` is the folder of the base model.
    """
    config: dict[str, Any] = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "mechanism": adapter.config.to_dict(),
        "base": asdict(base),
        "deltamem_version": __version__,
    }
    if reference is not None:
        config["reference"] = reference
    tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in adapter.state_dict().items()}
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise AdapterError(
            "The adapter contains NaN or infinity.",
            f"It is in {', '.join(broken)}; nothing was written.",
            "Train anew with a lower learning rate.",
        )
    if base.name and Path(base.name).is_dir() and resolve(base.name) == resolve(out):
        raise AdapterError(f"{out} is the base model itself.", "It would be replaced.", "Choose another folder.")
    with folder_whole(out, overwrite) as staged:
        (staged / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
        (staged / WEIGHTS_FILE).write_bytes(save(tensors, {"format": "pt"}))
        for name, content in (files or {}).items():
            (staged / name).write_bytes(content)

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
from deltamem_tool.io.atomic import atomic_folder, resolve, write_atomically
from deltamem_tool.io.names import is_gguf
from deltamem_tool.memory.adapter import DeltaMemAdapter
from deltamem_tool.memory.attach import adapter_of
from deltamem_tool.memory.attachment import hf_model


def save_adapter(
    model: PreTrainedModel, path: str | Path, overwrite: bool = False, files: Mapping[str, bytes] | None = None
) -> None:
    """Write the adapter of a model with a memory as a folder, whole or not at all.

    Args:
        model: a model with a memory.
        path: folder to write.
        overwrite: replace `path` if it exists.
        files: contents of further files to put into the folder, by file name.

    Raises:
        AdapterError: the adapter contains NaN or infinity, or `path` is the folder of the base model.
        ArchitectureError: accelerate has offloaded the adapter with the base model.
        DeltaMemError: `path` exists, or cannot be written.

    Example:
        >>> import deltamem_tool as deltamem
        >>> model = deltamem.load("builtin:adapter")
        >>> deltamem.save_adapter(model, "my-adapter")
        >>> deltamem.load("my-adapter").config.model_type
        'qwen3'
    """
    write_adapter(adapter_of(model), base_of_model(hf_model(model)), path, overwrite, files=files)


def save_beside(adapter: DeltaMemAdapter, base: BaseModel, folder: str | Path) -> None:
    """Write the adapter's files into `folder`, which may have other files. Each file is written whole or not at all.

    Raises:
        AdapterError: the adapter contains NaN or infinity, or `folder` is a file.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise AdapterError(f"{folder} is not a folder.", "Nothing was written.", "Choose another path.")
    contents = contents_of(adapter, base)
    for name in (WEIGHTS_FILE, CONFIG_FILE):  # a folder with only the weights is recognised as unfinished
        write_atomically(folder / name, contents[name])


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
        adapter: the adapter.
        base: the base model that it was made for.
        out: folder to write.
        overwrite: replace `out` if it exists.
        reference: stored in the config as is, to convert back to the reference implementation's format.
        files: contents of further files to put into the folder, by file name.

    Raises:
        AdapterError: the adapter contains NaN or infinity, or `out` is the folder of the base model.
    """
    contents = contents_of(adapter, base, reference)
    place = Path(base.name)
    folder = place.parent if is_gguf(place) and place.is_file() else place
    if base.name and folder.is_dir() and resolve(folder) == resolve(out):
        raise AdapterError(f"{out} has the base model in it.", "It would be replaced.", "Choose another folder.")
    with atomic_folder(out, overwrite) as staged:
        for name, content in {**contents, **(files or {})}.items():
            (staged / name).write_bytes(content)


def contents_of(
    adapter: DeltaMemAdapter, base: BaseModel, reference: Mapping[str, Any] | None = None
) -> dict[str, bytes]:
    """Return the contents of each file of the folder.

    Raises:
        AdapterError: the adapter contains NaN or infinity.
        ArchitectureError: accelerate has offloaded it with the base model.
    """
    adapter.check_materialized()
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
    return {
        CONFIG_FILE: (json.dumps(config, indent=2) + "\n").encode(),
        WEIGHTS_FILE: save(tensors, {"format": "pt"}),
    }

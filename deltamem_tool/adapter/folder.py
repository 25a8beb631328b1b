"""An adapter folder as it lies there: read strictly and checked, without its base model and without transformers."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from deltamem_tool.adapter.config_file import CONFIG_FILE, WEIGHTS_FILE, BaseModel, read_config
from deltamem_tool.config import DeltaMemConfig
from deltamem_tool.errors import AdapterError
from deltamem_tool.io.names import resolve_folder
from deltamem_tool.io.tensor_header import read_header
from deltamem_tool.memory.fingerprint import fingerprint_of
from deltamem_tool.memory.layer import DeltaMemory

_ANY = 2**31 - 1  # stands for a size that only the base model knows


def name_in(layer: int, name: str) -> str:
    """What the parameter `name` of a layer's memory is called in the file."""
    return f"layers.{layer}.{name}"


def layer_of(name: str) -> int | None:
    """The layer of a parameter in the file; None where `name` is no such parameter."""
    match = re.match(r"layers\.(\d+)\.", name)
    return int(match[1]) if match else None


@dataclass(frozen=True)
class AdapterFolder:
    """What an adapter folder says."""

    path: Path
    config: DeltaMemConfig
    base: BaseModel
    tensors: Mapping[str, Tensor]
    reference: Mapping[str, Any] | None = None  # what `reference.convert` has kept of the adapter that it read

    @cached_property
    def fingerprint(self) -> str:
        """What memories of this adapter are bound to."""
        return fingerprint_of(self.config, self.tensors)

    def num_parameters(self) -> int:
        return sum(tensor.numel() for tensor in self.tensors.values())

    @property
    def layer_indices(self) -> list[int]:
        """The decoder layers that have a memory."""
        if isinstance(self.config.layers, str):
            return sorted({layer for name in self.tensors if (layer := layer_of(name)) is not None})
        return sorted(self.config.layers)

    @property
    def memory_bytes(self) -> int:
        """Of one conversation."""
        of_layer = math.prod(self.config.state_shape) + self.config.segment_width
        return len(self.layer_indices) * of_layer * torch.float32.itemsize

    def check(self) -> None:
        """Compare names, types and numbers with the config; and the sizes that do not depend on the base model.

        Raises:
            AdapterError: tensors are missing, extra, misshapen or not finite; all of them are named.
        """
        with torch.device("meta"):
            layer = DeltaMemory(self.config, _ANY, {branch: _ANY for branch in self.config.heads})
        wanted = {
            name_in(index, name): [None if size == _ANY else size for size in tensor.shape]
            for index in self.layer_indices
            for name, tensor in layer.state_dict().items()
        }
        differences = [] if wanted else ["it has no layer"]
        for name, tensor in self.tensors.items():
            if tensor.dtype != torch.float32:
                differences.append(f"{name} is {tensor.dtype}, not float32")
            elif not tensor.is_meta and not tensor.isfinite().all():
                differences.append(f"{name} holds NaN or infinity")
        self.refuse(differences + self.differences(wanted))

    def differences(self, wanted: Mapping[str, Sequence[int | None]]) -> list[str]:
        """How the tensors differ from `wanted`, shapes by name, where None is any size."""
        found = {name: list(tensor.shape) for name, tensor in self.tensors.items()}
        differences = [f"missing {name}" for name in wanted.keys() - found.keys()]
        differences += [f"extra {name}" for name in found.keys() - wanted.keys()]
        for name in wanted.keys() & found.keys():
            shape = wanted[name]
            fits = len(found[name]) == len(shape) and all(
                b in (None, a) for a, b in zip(found[name], shape, strict=True)
            )
            if not fits:
                said = ", ".join("any" if size is None else str(size) for size in shape)
                differences.append(f"{name} is {found[name]}, not [{said}]")
        return differences

    def refuse(self, differences: Sequence[str]) -> None:
        if differences:
            raise AdapterError(
                f"{self.path / WEIGHTS_FILE} does not fit its config and base model.",
                "; ".join(sorted(differences)) + ".",
                "Fetch the adapter again, or pass the base model it was made for.",
            )


def read_adapter(path: str | Path, revision: str | None = None) -> AdapterFolder:
    """Read and check an adapter folder or Hub repository, without its base model.

    Raises:
        AdapterError: a file is missing, damaged, of a newer format, or does not fit the other one.
        HubError: there is no such folder or repository.
    """
    return with_tensors(describe_adapter(path, revision))


def describe_adapter(path: str | Path, revision: str | None = None) -> AdapterFolder:
    """The same from its config and the header of its weights alone, in which everything but the numbers is checked.
    The tensors are on torch's meta device: names and shapes.

    Raises:
        AdapterError: as `read_adapter`.
    """
    folder = resolve_folder(str(path), revision, [CONFIG_FILE, WEIGHTS_FILE], "adapter")
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise AdapterError(f"{path} is no adapter folder.", f"It has no {name}.", "Make one with `deltamem patch`.")
    said = read_config(folder, path)
    try:
        entries = read_header(folder / WEIGHTS_FILE).tensors
    except ValueError as error:
        raise AdapterError(f"{folder / WEIGHTS_FILE} is damaged.", f"{error}.", "Fetch the adapter again.") from error
    tensors = {
        name: torch.empty(entry.shape, dtype=getattr(torch, entry.dtype), device="meta")
        for name, entry in entries.items()
    }
    found = AdapterFolder(folder, said.mechanism, said.base, tensors, said.reference)
    found.check()
    return found


def with_tensors(described: AdapterFolder) -> AdapterFolder:
    """What `describe_adapter` found, with its tensors read, and checked once more.

    Raises:
        AdapterError: the weights are damaged, or hold what is no number.
    """
    file = described.path / WEIGHTS_FILE
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{file} is damaged.", f"{error}.", "Fetch the adapter again.") from error
    found = replace(described, tensors=tensors)
    found.check()
    return found

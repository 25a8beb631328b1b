"""Read and strictly check an adapter folder, without its base model. Imports no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, deserialize

from deltamem_tool.adapter.config_file import CONFIG_FILE, WEIGHTS_FILE, BaseModel, read_config
from deltamem_tool.config import DeltaMemConfig
from deltamem_tool.errors import AdapterError
from deltamem_tool.io.formats import PEFT_CONFIG_FILE
from deltamem_tool.io.names import check_revision, resolve_folder
from deltamem_tool.io.tensor_header import TensorEntry, read_header
from deltamem_tool.memory.weights import fingerprint_of, weight_shapes

FLOATS = ("float64", "float32", "float16", "bfloat16")  # accepted types of stored weights; all are read as float32


def name_in(layer: int, name: str) -> str:
    """Return the name in the file of the parameter `name` of a layer's memory."""
    return f"layers.{layer}.{name}"


def layer_of(name: str) -> int | None:
    """Return the layer of the parameter `name` in the file; None if it is not such a parameter."""
    match = re.match(r"layers\.(\d+)\.", name)
    return int(match[1]) if match else None


@dataclass(frozen=True)
class AdapterFolder:
    """The content of an adapter folder."""

    path: Path
    config: DeltaMemConfig
    base: BaseModel
    tensors: Mapping[str, NDArray[Any] | TensorEntry]  # arrays, or their entries in the header
    reference: Mapping[str, Any] | None = None  # the record that `reference.convert` kept of the converted adapter

    @cached_property
    def fingerprint(self) -> str:
        """The fingerprint that memories of this adapter are bound to."""
        return fingerprint_of(self.config, self.numbers())

    def numbers(self) -> dict[str, NDArray[Any]]:
        """The weights in float32; they must have been read."""
        return {name: tensor for name, tensor in self.tensors.items() if isinstance(tensor, np.ndarray)}

    def num_parameters(self) -> int:
        """Return the number of parameters."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values())

    @property
    def layer_indices(self) -> list[int]:
        """The decoder layers that have a memory."""
        if isinstance(self.config.layers, str):
            return sorted({layer for name in self.tensors if (layer := layer_of(name)) is not None})
        return sorted(self.config.layers)

    @property
    def memory_bytes(self) -> int:
        """Return the size of one conversation's memory in bytes."""
        of_layer = math.prod(self.config.state_shape) + self.config.segment_width
        return len(self.layer_indices) * of_layer * np.dtype(np.float32).itemsize

    def check(self) -> None:
        """Check names, types and values against the config, and the sizes that do not depend on the base model.

        Raises:
            AdapterError: tensors are missing, extra, misshapen or not finite; all of them are named.
        """
        of_layer = weight_shapes(self.config)
        wanted = {name_in(index, name): shape for index in self.layer_indices for name, shape in of_layer.items()}
        differences = [] if wanted else ["it has no layer"]
        for name, tensor in self.tensors.items():
            if str(tensor.dtype) not in FLOATS:
                differences.append(f"{name} is {tensor.dtype}, not float32")
            elif isinstance(tensor, np.ndarray) and not np.isfinite(tensor).all():
                differences.append(f"{name} contains NaN or infinity")
        self.check_shapes(wanted, differences)

    def _differences(self, wanted: Mapping[str, Sequence[int | None]]) -> list[str]:
        shapes = {name: list(tensor.shape) for name, tensor in self.tensors.items()}
        differences = [f"missing {name}" for name in wanted.keys() - shapes.keys()]
        differences += [f"extra {name}" for name in shapes.keys() - wanted.keys()]
        for name in wanted.keys() & shapes.keys():
            shape = wanted[name]
            fits = len(shapes[name]) == len(shape) and all(
                b in (None, a) for a, b in zip(shapes[name], shape, strict=True)
            )
            if not fits:
                expected = ", ".join("any" if size is None else str(size) for size in shape)
                differences.append(f"{name} is {shapes[name]}, not [{expected}]")
        return differences

    def check_shapes(self, wanted: Mapping[str, Sequence[int | None]], others: Sequence[str] = ()) -> None:
        """Compare the tensors with the shapes `wanted`, by name; None is any size.

        Raises:
            AdapterError: there are differences, or earlier ones in `others`; all of them are named.
        """
        if differences := [*others, *self._differences(wanted)]:
            raise AdapterError(
                f"{self.path / WEIGHTS_FILE} does not fit its config and base model.",
                f"Differences: {'; '.join(sorted(differences))}.",
                "Fetch the adapter again, or pass the base model it was made for.",
            )


def read_adapter(path: str | Path, revision: str | None = None) -> AdapterFolder:
    """Read and check an adapter folder or Hub repository, without its base model.

    Raises:
        AdapterError: a file is missing or damaged, has a newer format, or does not fit the other file.
        HubError: there is no such folder or repository.
    """
    return with_tensors(describe_adapter(path, revision))


def describe_adapter(path: str | Path, revision: str | None = None) -> AdapterFolder:
    """Read and check an adapter's config and the header of its weights. The result has no values of tensors.

    Raises:
        AdapterError: as `read_adapter`.
    """
    check_revision(str(path), revision)
    folder = resolve_folder(str(path), revision, [CONFIG_FILE, WEIGHTS_FILE], "adapter")
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            of_peft = (folder / PEFT_CONFIG_FILE).is_file()
            raise AdapterError(
                f"{path} is not an adapter folder.",
                f"It has no {name}.",
                "PEFT made it: load it with PEFT, or pass it as --lora."
                if of_peft
                else "Make one with `deltamem patch`.",
            )
    stored = read_config(folder, path)
    try:
        entries = read_header(folder / WEIGHTS_FILE).tensors
    except ValueError as error:
        raise AdapterError(f"{folder / WEIGHTS_FILE} is damaged.", f"{error}.", "Fetch the adapter again.") from error
    adapter = AdapterFolder(folder, stored.mechanism, stored.base, entries, stored.reference)
    adapter.check()
    return adapter


def with_tensors(described: AdapterFolder) -> AdapterFolder:
    """Read the tensors of an adapter from `describe_adapter`, and check it again.

    Raises:
        AdapterError: the weights are damaged, or contain NaN or infinity.
    """
    file = described.path / WEIGHTS_FILE
    try:
        stored = dict(deserialize(file.read_bytes()))  # type: ignore[no-untyped-call]  # in any order
        tensors = {name: _float32(stored[name]) for name in sorted(stored)}
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{file} is damaged.", f"{error}.", "Fetch the adapter again.") from error
    adapter = replace(described, tensors=tensors)
    adapter.check()
    return adapter


def _float32(tensor: Mapping[str, Any]) -> NDArray[np.float32]:
    """Convert a tensor of safetensors, whose type is one of `FLOATS`, to float32."""
    if tensor["dtype"] == "BF16":  # the upper half of a float32, which numpy does not know
        numbers = (np.frombuffer(tensor["data"], "<u2").astype("<u4") << 16).view("<f4")
    else:
        numbers = np.frombuffer(tensor["data"], {"F64": "<f8", "F32": "<f4", "F16": "<f2"}[tensor["dtype"]])
    with np.errstate(over="ignore"):  # infinity is rejected later
        return numbers.astype(np.float32).reshape(tensor["shape"])

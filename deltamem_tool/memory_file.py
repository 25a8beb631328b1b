"""The memory file: states of all layers as safetensors, bound to the adapter that wrote them. No torch.

One tensor `layers.{i}.state` a layer, float32 `[B, H, R, R]`; the metadata holds the format version and the adapter's
fingerprint. PyTorch and ONNX Runtime read and write the same files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from deltamem_tool.errors import MemoryStateError
from deltamem_tool.files import write_whole

FORMAT = "deltamem-memory"
FORMAT_VERSION = 1
_TENSOR = re.compile(r"layers\.(\d+)\.state")


def write_memory(path: str | Path, states: Mapping[int, np.ndarray], adapter: str) -> None:
    """Write `states`, float32 `[B, H, R, R]` by layer index, whole or not at all.

    Raises:
        MemoryStateError: a state holds NaN or infinity, so that the file could not be read again.
    """
    for layer, state in states.items():
        if not np.isfinite(state).all():
            raise MemoryStateError(
                f"The memory of layer {layer} holds NaN or infinity.", "It was not saved.", "Start from an earlier one."
            )
    tensors = {f"layers.{layer}.state": np.ascontiguousarray(state) for layer, state in states.items()}
    metadata = {"format": FORMAT, "format_version": str(FORMAT_VERSION), "adapter": adapter}
    write_whole(path, save(tensors, metadata))


def read_memory(path: str | Path) -> tuple[dict[int, np.ndarray], str]:
    """The states by layer index, and the fingerprint of the adapter that wrote them.

    Raises:
        MemoryStateError: the file is missing, is no memory, is newer than this version, or holds NaN.
    """
    path = Path(path)
    if not path.is_file():
        raise MemoryStateError(f"There is no memory file {path}.", "", "Save one first, or correct the path.")
    try:
        with safe_open(path, "np") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, TypeError) as error:  # TypeError: a dtype that numpy does not have
        raise MemoryStateError(
            f"{path} is no memory file.", f"It cannot be read: {error}.", "Use another file."
        ) from error
    if metadata.get("format") != FORMAT:
        raise MemoryStateError(f"{path} is no memory file.", "Its metadata does not say so.", "Use another file.")
    if metadata.get("format_version") != str(FORMAT_VERSION):
        raise MemoryStateError(
            f"{path} is of memory format {metadata.get('format_version')}.",
            f"This version of deltamem reads format {FORMAT_VERSION}.",
            "Update deltamem-tool.",
        )
    states = {}
    for name, tensor in tensors.items():
        match = _TENSOR.fullmatch(name)
        if match is None or tensor.ndim != 4 or tensor.dtype != np.float32:
            raise MemoryStateError(
                f"{path} is damaged.", f"Its tensor {name!r} is no float32 state.", "Use another file."
            )
        if not np.isfinite(tensor).all():
            raise MemoryStateError(
                f"{path} is damaged.", f"The state {name!r} holds NaN or infinity.", "Use another file."
            )
        states[int(match[1])] = tensor
    if not states or "adapter" not in metadata:
        raise MemoryStateError(f"{path} is damaged.", "It holds no states or no fingerprint.", "Use another file.")
    return dict(sorted(states.items())), metadata["adapter"]


def check_memory(
    found: Mapping[int, tuple[int, ...]], written_by: str, expected: Mapping[int, tuple[int, ...]], adapter: str
) -> None:
    """Refuse a memory with shapes `found`, by layer `(H, R, R)`, that `adapter` with shapes `expected` did not write.

    Raises:
        MemoryStateError: it belongs to another adapter, or has other layers, heads or rank.
    """
    if dict(found) != dict(expected):
        raise MemoryStateError(
            "This memory does not fit the adapter.",
            f"Its layers are {dict(found)}, the adapter's {dict(expected)}.",
            "Use the adapter that wrote it, or start with an empty memory.",
        )
    if written_by != adapter:
        raise MemoryStateError(
            "This memory belongs to another adapter.",
            f"It was written by {written_by[:16]}…, this is {adapter[:16]}….",
            "Use the adapter that wrote it, or start with an empty memory.",
        )

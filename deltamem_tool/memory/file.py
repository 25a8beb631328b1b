"""The memory file: the states of all layers as safetensors, bound to the adapter that wrote them. Imports no torch.

Each layer has a tensor `layers.{i}.state`, float32 `[B, H, R, R]`. If the adapter writes by segments, it also has
`layers.{i}.segment`, float32 `[B, W]`: the sums of the open segment, then its number of tokens. The metadata holds the
format version, the fingerprint of the adapter, and the version of deltamem that wrote the file. Both PyTorch and ONNX
Runtime read and write these files.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from deltamem_tool._version import __version__
from deltamem_tool.config import DeltaMemConfig
from deltamem_tool.errors import MemoryStateError
from deltamem_tool.io.atomic import write_atomically
from deltamem_tool.io.formats import is_newer, update_command
from deltamem_tool.io.names import expand_user
from deltamem_tool.io.tensor_header import LENGTH_BYTES, Header, header_of, read_header
from deltamem_tool.ops.numpy_write import write_segment

FORMAT = "deltamem-memory"
FORMAT_VERSION = 1
_TENSOR = re.compile(r"layers\.(0|[1-9][0-9]{0,5})\.(state|segment)")
_AXES = {"state": 4, "segment": 2}
_NUMBER = re.compile(r"[0-9]{1,9}")


@dataclass(frozen=True)
class MemoryShape:
    """Shapes of a memory's arrays for one conversation.

    Args:
        layers: `(H, R, R)` by layer index.
        segment_width: W, the number of values that a layer keeps of an open segment; 0 if every token writes.
    """

    layers: dict[int, tuple[int, ...]]
    segment_width: int = 0


@dataclass(frozen=True)
class StoredMemory:
    """The content of a memory file.

    Args:
        states: float32 `[B, H, R, R]` by layer index.
        open_segments: float32 `[B, W]` by layer index; empty if every token writes.
        adapter: fingerprint of the adapter that wrote the memory.
    """

    states: dict[int, np.ndarray]
    open_segments: dict[int, np.ndarray]
    adapter: str

    @property
    def shape(self) -> MemoryShape:
        """Shape of the memory: `(H, R, R)` by layer, and W."""
        segment = next((segment.shape[1] for segment in self.open_segments.values()), 0)
        return MemoryShape({layer: state.shape[1:] for layer, state in self.states.items()}, segment)

    def end_segment(self, config: DeltaMemConfig) -> StoredMemory:
        """Return the memory after its open segments are written. A row whose segment has no tokens does not change."""
        states = {
            layer: write_segment(config, self.states[layer], segment) for layer, segment in self.open_segments.items()
        }
        empty = {layer: np.zeros_like(segment) for layer, segment in self.open_segments.items()}
        return StoredMemory(self.states | states, empty, self.adapter)

    def row(self, number: int) -> StoredMemory:
        """Return the memory of one conversation."""
        states, segments = (
            {layer: array[number : number + 1].copy() for layer, array in part.items()}
            for part in (self.states, self.open_segments)
        )
        return StoredMemory(states, segments, self.adapter)

    @classmethod
    def stack(cls, memories: Sequence[StoredMemory]) -> StoredMemory:
        """Concatenate the conversations of all `memories`, which must belong to one adapter."""
        first = memories[0]
        states, segments = (
            {layer: np.concatenate([part[layer] for part in parts]) for layer in parts[0]}
            for parts in zip(*((memory.states, memory.open_segments) for memory in memories), strict=True)
        )
        return cls(states, segments, first.adapter)

    def tensors(self) -> dict[str, np.ndarray]:
        """Return the arrays by their names in the file."""
        states = {f"layers.{layer}.state": state for layer, state in self.states.items()}
        return states | {f"layers.{layer}.segment": segment for layer, segment in self.open_segments.items()}

    def digest(self) -> str:
        """Return the SHA-256 of the content. The bytes of a file also depend on the order of its header."""
        content = hashlib.sha256(self.adapter.encode())
        for name, tensor in sorted(self.tensors().items()):
            content.update(f"{name} {tensor.shape}".encode())
            content.update(tensor.tobytes())
        return content.hexdigest()


def write_memory(path: str | Path, memory: StoredMemory) -> None:
    """Write a memory file, whole or not at all.

    Raises:
        MemoryStateError: the memory contains NaN or infinity, so that the file could not be read again.
    """
    write_atomically(path, memory_bytes(memory))


def memory_bytes(memory: StoredMemory) -> bytes:
    """Return a memory as the bytes of a memory file.

    Raises:
        MemoryStateError: the memory contains NaN or infinity, so that the file could not be read again.
    """
    tensors = memory.tensors()
    for name, tensor in tensors.items():
        if not np.isfinite(tensor).all():
            raise MemoryStateError(
                f"The memory contains NaN or infinity: {name}.", "It was not saved.", "Start from an earlier one."
            )
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "adapter": memory.adapter,
        "deltamem_version": __version__,
    }
    return _sort_metadata(save({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, metadata))


def _sort_metadata(content: bytes) -> bytes:
    """Sort the metadata of `content` by name, as safetensors does with tensors: equal memories are equal bytes."""
    begin = LENGTH_BYTES + int.from_bytes(content[:LENGTH_BYTES], "little")
    header = json.loads(content[LENGTH_BYTES:begin])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return content[:LENGTH_BYTES] + text.ljust(begin - LENGTH_BYTES) + content[begin:]


def check_replaceable(path: str | Path) -> None:
    """Check that `path` does not exist, or is a memory file, which may be replaced.

    Raises:
        MemoryStateError: `path` exists and is not a memory file.
    """
    path = expand_user(path)
    if not path.exists():
        return
    try:
        read_memory(path)
    except MemoryStateError as error:
        raise MemoryStateError(
            f"{path} exists and is not a memory file.", "It would be overwritten.", "Choose another file."
        ) from error


def read_memory(path: str | Path) -> StoredMemory:
    """Read a memory file.

    Raises:
        MemoryStateError: the file is missing, is not a memory file, has a newer format, or contains NaN.
    """
    path = expand_user(path)
    if not path.exists():
        raise MemoryStateError(f"The memory file {path} does not exist.", "", "Save one first, or correct the path.")
    if not path.is_file():
        raise MemoryStateError(f"{path} is not a memory file.", "It is not a regular file.", "Use another file.")
    try:
        _check_header(path, read_header(path))  # before all of it is read: it may be any file, of any size
        return memory_from_bytes(path.read_bytes(), str(path))  # at once, since it may be replaced
    except MemoryStateError:
        raise
    except (SafetensorError, OSError, ValueError) as error:
        raise _unreadable_error(path, error) from error


def memory_from_bytes(content: bytes, name: str) -> StoredMemory:
    """Read a memory from the bytes of a memory file; error messages call it `name`.

    Raises:
        MemoryStateError: the bytes are not those of a memory file, have a newer format, or contain NaN.
    """
    try:
        header = header_of(content)
        _check_header(name, header)
        return _memory(name, header, load(content))
    except MemoryStateError:
        raise
    except (SafetensorError, ValueError) as error:
        raise _unreadable_error(name, error) from error


def _unreadable_error(name: str | Path, error: Exception) -> MemoryStateError:
    return MemoryStateError(f"{name} is not a memory file.", f"It cannot be read: {error}.", "Use another file.")


def _memory(name: str | Path, header: Header, tensors: dict[str, np.ndarray]) -> StoredMemory:
    """Build a memory from tensors, whose header is already checked. Raise if a conversation cannot continue from it."""
    parts: dict[str, dict[int, np.ndarray]] = {"state": {}, "segment": {}}
    for tensor_name, tensor in tensors.items():
        match = _TENSOR.fullmatch(tensor_name)
        assert match is not None  # or the header had been refused
        if not np.isfinite(tensor).all():
            raise _damaged_error(name, f"The state {tensor_name!r} contains NaN or infinity")
        parts[match[2]][int(match[1])] = tensor
    states, segments = (dict(sorted(part.items())) for part in parts.values())
    if len({state.shape[1:] for state in states.values()}) > 1 or any(
        s.shape[2] != s.shape[3] for s in states.values()
    ):
        raise _damaged_error(name, "Its states are not square, or differ in size")
    if segments and (segments.keys() != states.keys() or len({segment.shape for segment in segments.values()}) > 1):
        raise _damaged_error(name, "Its layers disagree on their open segments")
    if len({tensor.shape[0] for tensor in tensors.values()}) > 1:
        raise _damaged_error(name, "Its layers disagree on the number of conversations")
    return StoredMemory(states, segments, header.metadata["adapter"])


def _check_header(path: str | Path, header: Header) -> None:
    """Check that a header is that of a memory file.

    Raises:
        MemoryStateError: the header is not that of a memory, or of a newer format, or names other tensors than states.
    """
    metadata = header.metadata
    if metadata.get("format") != FORMAT:
        raise MemoryStateError(
            f"{path} is not a memory file.", "Its metadata does not say that it is.", "Use another file."
        )
    version = metadata.get("format_version")
    if version != str(FORMAT_VERSION):
        newer = version is not None and _NUMBER.fullmatch(version) and is_newer(int(version), FORMAT_VERSION)
        raise MemoryStateError(
            f"{path} is of memory format {version}.",
            f"This version of deltamem reads format {FORMAT_VERSION}.",
            f"Update deltamem-tool: {update_command(metadata.get('deltamem_version'))}"
            if newer
            else "Use another file.",
        )
    for name, entry in header.tensors.items():
        match = _TENSOR.fullmatch(name)
        if match is None or len(entry.shape) != _AXES[match[2]] or entry.dtype != "float32":
            raise _damaged_error(path, f"Its tensor {name!r} is not a float32 state")
    if not any(name.endswith(".state") for name in header.tensors) or "adapter" not in metadata:
        raise _damaged_error(path, "It contains no states or no fingerprint")


def _damaged_error(path: str | Path, why: str) -> MemoryStateError:
    return MemoryStateError(f"{path} is damaged.", f"{why}.", "Use another file.")


def check_memory(shape: MemoryShape, written_by: str, expected: MemoryShape, adapter: str) -> None:
    """Check that a memory belongs to an adapter.

    Args:
        shape: shape of the memory.
        written_by: fingerprint of the adapter that wrote it.
        expected: shape of the adapter's memories.
        adapter: fingerprint of the adapter.

    Raises:
        MemoryStateError: the memory belongs to another adapter, or has other layers, heads, rank or segments.
    """
    if shape != expected:
        raise MemoryStateError("This memory does not fit the adapter.", _difference(shape, expected), _USE_ANOTHER)
    if written_by != adapter:
        raise MemoryStateError(
            "This memory belongs to another adapter.",
            f"It was written by the adapter {written_by[:16]}…, this is {adapter[:16]}….",
            _USE_ANOTHER,
        )


_USE_ANOTHER = "Use the adapter that wrote it, or start from an empty memory."


def _difference(shape: MemoryShape, expected: MemoryShape) -> str:
    """Describe the first difference."""
    if shape.layers.keys() != expected.layers.keys():
        return f"Its layers are {sorted(shape.layers)}, the adapter's {sorted(expected.layers)}."
    for layer, state in shape.layers.items():
        wanted = expected.layers[layer]
        if state != wanted:
            name, axis = ("state heads", 0) if state[0] != wanted[0] else ("rank", 1)
            return f"Its layer {layer} has {name} {state[axis]}, the adapter's {wanted[axis]}."
    return f"It keeps {shape.segment_width} numbers of an open segment, the adapter {expected.segment_width}."

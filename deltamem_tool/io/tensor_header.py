"""Read the header of a safetensors file, which describes its tensors, without reading the tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, deserialize, safe_open

# An entry takes about 120 bytes, and a layer's memory has at most 15 tensors: 1000 layers need 2 MB.
MAX_HEADER_BYTES = 4 * 2**20
LENGTH_BYTES = 8  # the file begins with the length of its header, as a 64-bit number
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class TensorEntry:
    """The header's entry for one tensor."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Header:
    """Types and shapes of the tensors by name, and the writer's metadata."""

    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]


def read_header(path: Path) -> Header:
    """Return the header of `path`. safetensors checks it against the file's size.

    Raises:
        ValueError: The header is damaged, larger than `MAX_HEADER_BYTES`, or does not fit the file.
    """
    with path.open("rb") as start:
        length = int.from_bytes(start.read(LENGTH_BYTES), "little")
    if MAX_HEADER_BYTES < length < path.stat().st_size:
        raise ValueError(f"Its header is larger than {MAX_HEADER_BYTES} bytes")
    try:
        with safe_open(path, "np") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - it has no other iterator
            tensors = {
                name: TensorEntry(_DTYPES.get(part.get_dtype(), part.get_dtype()), tuple(part.get_shape()))
                for name, part in parts.items()
            }
            return Header(tensors, file.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"Its header is damaged, or the file is truncated ({error})") from error


def header_of(content: bytes) -> Header:
    """Return the header of a safetensors file's content.

    Raises:
        ValueError: The header is damaged, larger than `MAX_HEADER_BYTES`, or does not fit the content.
    """
    length = int.from_bytes(content[:LENGTH_BYTES], "little")
    if MAX_HEADER_BYTES < length < len(content):
        raise ValueError(f"Its header is larger than {MAX_HEADER_BYTES} bytes")
    try:
        deserialize(content)  # type: ignore[no-untyped-call]
    except SafetensorError as error:
        raise ValueError(f"Its header is damaged, or the file is truncated ({error})") from error
    entries = json.loads(content[LENGTH_BYTES : LENGTH_BYTES + length])
    metadata = entries.pop("__metadata__", None) or {}
    tensors = {
        name: TensorEntry(_DTYPES.get(entry["dtype"], entry["dtype"]), tuple(entry["shape"]))
        for name, entry in entries.items()
    }
    return Header(tensors, metadata)

"""The header of a safetensors file, checked by itself: what the file says of its tensors before any of them is read.

The file begins with the header's length, 8 bytes, and the header, JSON: type, shape and place of every tensor by name.
The tensors follow, without gaps. The safetensors package checks much of this too; here it has limits, and one error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltamem_tool.io.safe_json import parse_json

# A name, a type and a place take 120 bytes: a layer's memory has at most 15 tensors, and 1000 layers have 2 MB.
MAX_HEADER_BYTES = 4 * 2**20
MAX_NAME = 256  # characters; ours have 30
MAX_SIZE = 2**31 - 1  # of one axis: the largest vocabularies are of 2**18
MAX_AXES = 8  # ours have 4
_LENGTH_BYTES = 8
_DTYPES = {  # name and bytes of one number
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}


@dataclass(frozen=True)
class TensorEntry:
    """What the header says of one tensor."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]


def read_header(path: Path) -> Header:
    """The header of `path`, which fits the file's size.

    Raises:
        ValueError: it is none, is absurd, or does not fit the file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if size < _LENGTH_BYTES or length > size - _LENGTH_BYTES:
            raise ValueError("it is shorter than its header says")
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"its header is larger than {MAX_HEADER_BYTES} bytes")
        said = parse_json(file.read(length))
    if not isinstance(said, dict):
        raise ValueError("its header is no JSON object")
    metadata = said.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata is no text")
    tensors = {name: _entry(name, content) for name, content in said.items()}
    _refuse_gaps(tensors, size - _LENGTH_BYTES - length)
    return Header(tensors, metadata)


def _entry(name: str, content: Any) -> TensorEntry:
    """
    Raises:
        ValueError: the type, the shape or the place is none, or they do not fit each other.
    """
    if len(name) > MAX_NAME:
        raise ValueError(f"a tensor's name is longer than {MAX_NAME} characters")
    if not isinstance(content, dict) or content.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"its header says of {name} something other than type, shape and place")
    dtype, shape, place = content["dtype"], content["shape"], content["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(f"the type of {name} is not known")
    if not _is_sizes(shape, MAX_SIZE) or len(shape) > MAX_AXES:
        raise ValueError(f"the shape of {name} cannot be")
    if not _is_sizes(place, math.inf) or len(place) != 2:
        raise ValueError(f"the place of {name} cannot be")
    known, width = _DTYPES[dtype]
    if place[1] - place[0] != math.prod(shape) * width:
        raise ValueError(f"the shape of {name} does not fit its size in bytes")
    return TensorEntry(known, tuple(shape), *place)


def _is_sizes(content: Any, most: float) -> bool:
    return isinstance(content, list) and all(type(size) is int and 0 <= size <= most for size in content)


def _refuse_gaps(tensors: Mapping[str, TensorEntry], size: int) -> None:
    """
    Raises:
        ValueError: the tensors overlap, or are not all that the file holds.
    """
    at = 0
    for entry in sorted(tensors.values(), key=lambda entry: (entry.begin, entry.end)):
        if entry.begin != at:
            raise ValueError("its tensors overlap, or leave gaps")
        at = entry.end
    if at != size:
        raise ValueError("its tensors are not all that it holds, or it is cut short")

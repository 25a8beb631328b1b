"""Read small untrusted files within limits. A ValueError says what is wrong with them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

# The largest known file is a tokenizer_config.json of 1 MiB with many added tokens. Our own have a few kilobytes.
MAX_JSON_BYTES = 8 * 2**20
MAX_DEPTH = 64  # of nested objects and lists; our own files have 4, and Python's parser fails at about 1000


def read_bytes(path: Path, limit: int) -> bytes:
    """Return the content of `path`. At most `limit` bytes and one more are read.

    Raises:
        ValueError: the file is larger.
    """
    with path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"It is larger than {limit} bytes")
    return content


def read_text(path: Path, limit: int = MAX_JSON_BYTES) -> str:
    """Read a UTF-8 file like `read_bytes`, without a byte-order mark."""
    return read_bytes(path, limit).decode("utf-8-sig")


def parse_json(text: str | bytes, finite: bool = True) -> Any:
    """Parse JSON. If `finite`, NaN and infinity are rejected.

    Raises:
        ValueError: `text` is not JSON, is nested deeper than `MAX_DEPTH`, or has a number that `finite` rejects.
    """
    hooks: Any = {"parse_constant": _check_constant, "parse_float": _finite} if finite else {}
    try:
        value = json.loads(text, **hooks)
    except RecursionError as error:
        raise ValueError("Its objects and lists are nested too deeply") from error
    _check_depth(value, MAX_DEPTH)
    return value


def read_json(path: Path, finite: bool = True) -> Any:
    """Parse a file of at most `MAX_JSON_BYTES` like `parse_json`."""
    return parse_json(read_text(path), finite)


def _check_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError("A number is too large")
    return number


def _check_depth(value: Any, room: int) -> None:
    if not isinstance(value, dict | list):
        return
    if room == 0:
        raise ValueError(f"Its objects and lists are nested deeper than {MAX_DEPTH}")
    for part in value.values() if isinstance(value, dict) else value:
        _check_depth(part, room - 1)

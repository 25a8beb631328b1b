"""Content of a row: encrypted where the store is, and checked by its digest."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from deltamem_tool.serve.store.encryption import Cipher
from deltamem_tool.serve.store.errors import StoreDamaged


def digest_of(data: bytes) -> str:
    """Return the SHA-256 of `data` in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def open_data(cipher: Cipher, sealed: bytes, digest: str, *place: str | int) -> bytes:
    """Return a row's memory.

    Raises:
        StoreDamaged: it is not the one that was written there.
    """
    data = cipher.open(sealed, *place)
    if digest_of(data) != digest:
        raise StoreDamaged(
            "A row of the store is damaged.",
            "Its content does not have its digest.",
            "Restore the database from a backup, or delete this memory.",
        )
    return data


def seal_json(cipher: Cipher, value: Any, *place: str | int) -> bytes:
    """Return `value` as JSON, sealed."""
    return cipher.seal(json.dumps(value, separators=(",", ":")).encode(), *place)


def open_json(cipher: Cipher, sealed: bytes, *place: str | int) -> Any:
    """Return the value that `seal_json` wrote.

    Raises:
        StoreDamaged: it is not JSON, or not the row's.
    """
    try:
        return json.loads(cipher.open(sealed, *place))
    except ValueError as error:
        raise StoreDamaged(
            "A row of the store is damaged.", "Its notes are not JSON.", "Restore the database from a backup."
        ) from error

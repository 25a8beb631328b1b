"""The content of versions and responses: a memory and a note in JSON, encrypted if the store is."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sqlalchemy import Connection, bindparam, delete, insert

from deltamem_tool.serve.store.encryption import Cipher
from deltamem_tool.serve.store.overflow import OverflowPages
from deltamem_tool.serve.store.schema import contents

_NOTE_LENGTH = struct.Struct("<Q")
_ADD = insert(contents).returning(contents.c.key)
_REMOVE = delete(contents).where(contents.c.key.in_(bindparam("keys", expanding=True)))


class Entry(NamedTuple):
    """A stored content.

    Args:
        key: key of its row.
        digest: SHA-256 of the memory, in hexadecimal.
        size: bytes of the memory and the note.
    """

    key: int
    digest: str
    size: int


@dataclass(frozen=True)
class Contents:
    """Writes and reads contents.

    Args:
        cipher: encrypts the contents.
        pages: wraps the contents for SQLite; None for PostgreSQL.
    """

    cipher: Cipher
    pages: OverflowPages | None

    def write(self, connection: Connection, data: bytes, note: Any, *place: str | int) -> Entry:
        """Add a content. `place` names the row of the version or response that it belongs to."""
        text = json.dumps(note, separators=(",", ":")).encode()
        digest = hashlib.sha256(data).hexdigest()
        blob = self.cipher.seal(_NOTE_LENGTH.pack(len(text)) + text + data, *place, digest)
        if self.pages is not None:
            blob = self.pages.wrap(blob)
        key = connection.execute(_ADD, {"content": blob}).scalar_one()
        return Entry(key, digest, len(text) + len(data))

    def read(self, blob: bytes, digest: str, *place: str | int) -> tuple[bytes, Any]:
        """Return the memory and the note of a row's content.

        Raises:
            StoreDamaged: the content is not the one that was written for this row.
        """
        content = self.cipher.open(blob if self.pages is None else self.pages.unwrap(blob), *place, digest)
        end = _NOTE_LENGTH.size + _NOTE_LENGTH.unpack_from(content)[0]
        return content[end:], json.loads(content[_NOTE_LENGTH.size : end])


def remove_contents(connection: Connection, keys: Sequence[int]) -> None:
    """Delete the contents with these keys."""
    if keys:
        connection.execute(_REMOVE, {"keys": keys})

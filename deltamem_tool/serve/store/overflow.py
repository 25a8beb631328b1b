"""Pad content so that SQLite's `secure_delete` leaves nothing of it behind.

SQLite splits a long row. The first bytes stay in a leaf of the table's tree, and the rest goes to overflow pages, which
are overwritten with zeros when the row is deleted. Leaves do not guarantee that: when rows move between them, copies
remain in their free space. So the content starts after more zeros than stay in a leaf, and ends with as many zeros as
SQLite needs to keep no more in the leaf than it must. Names, times and digests are not protected in this way. The
computation follows https://www.sqlite.org/fileformat2.html (1.6).
"""

from __future__ import annotations

import struct

from deltamem_tool.serve.store.errors import StoreDamaged

_LENGTH = struct.Struct("<Q")


class OverflowPages:
    """Converts content to the blob of a row `(INTEGER PRIMARY KEY, BLOB)`, and back.

    Args:
        page: bytes of a page, without reserved bytes.
    """

    def __init__(self, page: int) -> None:
        self._least = (page - 12) * 32 // 255 - 23  # bytes of a long row that stay in the leaf: the minimum
        self._most = page - 35  # and the maximum
        self._page = page - 4  # bytes of the row in one overflow page

    def wrap(self, content: bytes) -> bytes:
        """Return `content` padded with zeros on both sides."""
        blob = b"\0" * self._least + _LENGTH.pack(len(content)) + content
        return blob + b"\0" * self._padding_length(len(blob))

    def unwrap(self, blob: bytes) -> bytes:
        """Return the content of a blob from `wrap`.

        Raises:
            StoreDamaged: the blob is truncated.
        """
        start = self._least + _LENGTH.size
        length = _LENGTH.unpack_from(blob, self._least)[0] if len(blob) >= start else len(blob)
        if start + length > len(blob):
            raise StoreDamaged(
                "A row of the store is damaged.", "It is truncated.", "Restore the database from a backup."
            )
        return blob[start : start + length]

    def _padding_length(self, length: int) -> int:
        """How many bytes to append to a blob of `length` so that only the minimum stays in the leaf."""
        row = _row_bytes(length)
        local = row if row <= self._most else self._least + (row - self._least) % self._page
        return 0 if local == self._least or local > self._most else self._most + 1 - local


def _row_bytes(blob: int) -> int:
    """Bytes of a row: the length of its header, the types of the key and of the blob, and the blob."""
    return 1 + 1 + _varint_bytes(2 * blob + 12) + blob


def _varint_bytes(number: int) -> int:
    """Bytes of SQLite's variable-length integer: seven bits each."""
    return max(1, -(-number.bit_length() // 7))

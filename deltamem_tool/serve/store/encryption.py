"""Encrypt and authenticate stored content with AES-256-GCM, or protect it with a checksum.

Each seal is bound to its row, so that no row can be passed off as another. Memories, turns and transcripts are
encrypted. Names, times, sizes and digests are not. Nonces are random, which is safe for about four billion writes with
one key.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
from typing import Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from deltamem_tool.errors import ConfigError
from deltamem_tool.serve.store.errors import StoreDamaged

KEY_VARIABLE = "DELTAMEM_STORE_KEY"
KEY_BYTES = 32
NONCE_BYTES = 12
CHECKSUM_BYTES = 32


class Cipher(Protocol):
    """Converts content to the bytes to store, and back. `place` identifies the kind of content and its row."""

    def seal(self, content: bytes, *place: str | int) -> bytes:
        """Return the bytes to store."""

    def open(self, sealed: bytes, *place: str | int) -> bytes:
        """Return the content.

        Raises:
            StoreDamaged: the bytes are damaged, or belong to another place or another key.
        """


class Checksum:
    """Stores content after a SHA-256 of the place and the content. It detects damage, but anyone can compute it."""

    def seal(self, content: bytes, *place: str | int) -> bytes:
        """Return checksum and content."""
        return _checksum(content, place) + content

    def open(self, sealed: bytes, *place: str | int) -> bytes:
        """Return the content.

        Raises:
            StoreDamaged: the bytes are damaged, or belong to another place.
        """
        content = sealed[CHECKSUM_BYTES:]
        if sealed[:CHECKSUM_BYTES] != _checksum(content, place):
            raise StoreDamaged(
                "A row of the store is damaged.",
                "Its checksum does not match.",
                "Restore the database from a backup, or delete this memory.",
            )
        return content


class AesGcm:
    """Stores a nonce and the ciphertext, authenticated together with the place."""

    def __init__(self, key: bytes) -> None:
        self._aead = AESGCM(key)

    def seal(self, content: bytes, *place: str | int) -> bytes:
        """Return nonce and ciphertext."""
        nonce = os.urandom(NONCE_BYTES)
        return nonce + self._aead.encrypt(nonce, content, _associated_data(place))

    def open(self, sealed: bytes, *place: str | int) -> bytes:
        """Return the content.

        Raises:
            StoreDamaged: the bytes are damaged, or belong to another place or another key.
        """
        try:
            return self._aead.decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], _associated_data(place))
        except (InvalidTag, ValueError) as error:  # ValueError: too short for a nonce
            raise StoreDamaged(
                "A row of the store cannot be decrypted.",
                "It is damaged, was moved from another row, or was written with another key.",
                "Restore the database from a backup, or delete this memory.",
            ) from error


def _checksum(content: bytes, place: tuple[str | int, ...]) -> bytes:
    return hashlib.sha256(_associated_data(place) + content).digest()


def _associated_data(place: tuple[str | int, ...]) -> bytes:
    return json.dumps(place).encode()


def read_key(text: str) -> bytes:
    """Decode a key from base64.

    Raises:
        ConfigError: `text` is not 32 bytes in base64.
    """
    try:
        key = base64.b64decode(text.strip(), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if len(key) != KEY_BYTES:
        raise ConfigError(
            f"The key in {KEY_VARIABLE} is invalid.",
            f"It must be {KEY_BYTES} bytes in base64.",
            f"Create one: python -c 'import base64, os; print(base64.b64encode(os.urandom({KEY_BYTES})).decode())'",
        )
    return key

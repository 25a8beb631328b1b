"""API keys: a file of tenants and the SHA-256 of their keys. The keys themselves are not stored."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path

from deltamem_tool.errors import ConfigError
from deltamem_tool.io.atomic import file_lock, write_atomically
from deltamem_tool.io.names import expand_user
from deltamem_tool.io.safe_json import read_text
from deltamem_tool.serve.errors import RequestError

KEY_PREFIX = "dm-"
KEY_BYTES = 32  # random bytes: too many to guess, so that a plain SHA-256 keeps the key secret
ONLY_TENANT = "default"  # the tenant of a server without keys
_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_LINE = re.compile(rf"({_TENANT.pattern})\s+sha256:([0-9a-f]{{64}})")


class ApiKeys:
    """The API keys that a server accepts.

    Args:
        tenants: pairs of a tenant and the SHA-256 of one of its keys, in hexadecimal.
    """

    def __init__(self, tenants: Sequence[tuple[str, str]]) -> None:
        self._tenants = [(tenant, bytes.fromhex(digest)) for tenant, digest in tenants]

    @classmethod
    def read(cls, path: str | Path) -> ApiKeys:
        """Read a key file.

        Raises:
            ConfigError: the file is missing, contains no keys, or has an invalid line.
        """
        path = expand_user(path)
        entries = _entries(path)
        if not entries:
            raise ConfigError(
                f"{path} contains no keys.",
                "Nobody could use the server.",
                "Create one: deltamem serve --new-key TENANT.",
            )
        return cls(entries)

    def tenant_of(self, headers: Mapping[str, str]) -> str:
        """Return the tenant of the key in the header `Authorization`.

        Every key is compared, each in constant time, so that the duration reveals nothing.

        Raises:
            RequestError: there is no key, or a wrong one.
        """
        scheme, _, key = headers.get("authorization", "").partition(" ")
        digest = hashlib.sha256(key.strip().encode()).digest()
        matches = [tenant for tenant, known in self._tenants if hmac.compare_digest(digest, known)]
        if scheme.lower() != "bearer" or not matches:
            raise RequestError(
                "The API key is missing or wrong.",
                "",
                "Send the header 'Authorization: Bearer KEY'.",
                status=401,
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return matches[0]


def new_key(path: str | Path, tenant: str) -> str:
    """Add a key for `tenant` to a key file, which need not exist, and return it. It cannot be retrieved later.

    Raises:
        ConfigError: the tenant's name is invalid, or the file is not one of keys.
    """
    path = expand_user(path)
    if not _TENANT.fullmatch(tenant):
        raise ConfigError(
            f"{tenant!r} is not a valid tenant name.",
            "A name has 1 to 64 letters, digits, dots, hyphens and underscores, and starts with a letter or digit.",
            "Use another name.",
        )
    key = KEY_PREFIX + secrets.token_urlsafe(KEY_BYTES)
    line = f"{tenant} sha256:{hashlib.sha256(key.encode()).hexdigest()}\n"
    with file_lock(path):
        former = ""
        if path.exists():
            _entries(path)  # raises if it is another kind of file, which must not be changed
            former = read_text(path)
            former += "" if not former or former.endswith("\n") else "\n"
        write_atomically(path, (former + line).encode())
    return key


def _entries(path: Path) -> list[tuple[str, str]]:
    try:
        lines = read_text(path).splitlines()
    except FileNotFoundError as error:
        raise ConfigError(
            f"The key file {path} does not exist.", "", "Create it: deltamem serve --new-key TENANT."
        ) from error
    except ValueError as error:
        raise ConfigError(f"{path} is not a key file.", f"{error}.", "Use another file.") from error
    entries = []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line.strip())
        if match is None:
            raise ConfigError(
                f"Line {number} of {path} is not a valid entry.",
                "An entry is a tenant, followed by 'sha256:' and 64 hexadecimal digits.",
                "Correct it, or create a new key: deltamem serve --new-key TENANT.",
            )
        entries.append((match[1], match[2]))
    return entries

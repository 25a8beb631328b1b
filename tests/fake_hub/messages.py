"""A request as the server logs it, and a reply."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from email.message import Message
from types import MappingProxyType
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

Match = str | Callable[["Request"], bool]


@dataclass
class Reply:
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


def as_json(content: Any, status: int = 200, headers: Mapping[str, str] = MappingProxyType({})) -> Reply:
    return Reply(status, {"Content-Type": "application/json; charset=utf-8", **headers}, json.dumps(content).encode())


@dataclass
class Request:
    """One request and what became of it.

    Attributes:
        method: GET, HEAD, POST, PUT or DELETE.
        target: path and query as they were sent.
        headers: names are not case-sensitive.
        storage: whether it went to the storage instead of the Hub itself.
        body: the part of it that was read.
        status: of the answer; None if the connection was cut before.
        file: `owner/name/path` of the file whose content was requested.
        cut_at: the byte of the request or of the answer's body at which a fault cut the connection.
    """

    method: str
    target: str
    headers: Message
    storage: bool = False
    body: bytes = b""
    status: int | None = None
    file: str | None = None
    cut_at: int | None = None

    @property
    def raw_path(self) -> str:
        """The path, still quoted, because the name of a branch may contain slashes."""
        return urlsplit(self.target).path

    @property
    def query(self) -> dict[str, str]:
        return {name: values[-1] for name, values in parse_qs(urlsplit(self.target).query).items()}

    @property
    def line(self) -> str:
        return f"{self.method} {unquote(self.target)}"

    @property
    def size(self) -> int:
        return len(self.body)

    def flag(self, name: str) -> bool:
        return self.query.get(name, "").lower() in ("1", "true")

    def json(self) -> Any:
        return json.loads(self.body or b"{}")

    def matches(self, match: Match) -> bool:
        """`match` is a regular expression searched in `METHOD /path?query`, unquoted; or a predicate."""
        return re.search(match, self.line) is not None if isinstance(match, str) else match(self)

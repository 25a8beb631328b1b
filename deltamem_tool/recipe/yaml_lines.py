"""Read YAML with the line of every key, so that errors can name it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import yaml

from deltamem_tool.errors import ConfigError, Key

DEPTH = 3  # levels of nested keys whose lines are recorded


class _Loader(yaml.SafeLoader):
    """YAML 1.1, but with the numbers of 1.2: 2e-4 is a number, not text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+"), list("-+.0123456789")
)


@dataclass
class Document:
    """What a YAML document contains, and on which line each key is."""

    value: Any = None
    lines: dict[Key, list[int]] = field(default_factory=dict)  # from 1; more than one if a key is repeated


def read_yaml(text: str, name: str) -> Document:
    """Read one document.

    Raises:
        ConfigError: `text` is not YAML, or contains Python objects; the error names `name`.
    """
    document = Document()
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is not None:
                _number(node, (), document)
                document.value = loader.construct_document(node)
        finally:
            loader.dispose()
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date such as 2026-13-01
        why = " ".join(str(error).split())
        raise ConfigError(f"{name} is not YAML.", f"{why[:1].upper()}{why[1:]}.", "Correct it.") from error
    return document


def read_changes(changes: Iterable[str]) -> dict[str, Any]:
    """Parse `KEY=VALUE` pairs, with values in YAML.

    Raises:
        ConfigError: a change is not such a pair, or a key is repeated.
    """
    values: dict[str, Any] = {}
    for change in changes:
        key, equals, text = (part.strip() for part in change.partition("="))
        if not key or not equals:
            raise ConfigError(
                f"{change!r} is not KEY=VALUE.",
                "It has no key or no equals sign.",
                "Write for example --set episodes=50.",
            )
        if key in values:
            raise ConfigError(f"{key} is given more than once.", "Only one value can apply.", "Leave out all but one.")
        values[key] = read_yaml(text, f"The value of {key}").value
    return values


def _number(node: yaml.Node, at: Key, document: Document) -> None:
    """Record the lines of a mapping's keys."""
    if not isinstance(node, yaml.MappingNode) or len(at) == DEPTH:
        return
    for key, value in node.value:
        if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
            path = (*at, key.value)
            document.lines.setdefault(path, []).append(key.start_mark.line + 1)
            _number(value, path, document)

"""The versions that wrote a file, and the command to run if its format is newer than this version reads."""

from __future__ import annotations

import platform
import re
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from deltamem_tool._version import __version__

# What a saved tokenizer consists of.
TOKENIZER_FILE = "tokenizer.json"
MODEL_CONFIG_FILE, PEFT_CONFIG_FILE = "config.json", "adapter_config.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"

_PACKAGE = "deltamem-tool"
# A part of what packaging's specification allows, in ASCII: it goes into a command that somebody may paste.
_VERSION = re.compile(r"[0-9]{1,4}(\.[0-9]{1,4}){1,3}((a|b|rc)[0-9]{1,3})?(\.post[0-9]{1,3})?(\.dev[0-9]{1,4})?")


def update_command(written_by: Any) -> str:
    """The command that installs what reads a file, whose writer calls its own version `written_by`.

    That comes from a stranger's file: it is named only where it is a version, and a newer one.
    """
    if isinstance(written_by, str) and _VERSION.fullmatch(written_by) and _release(written_by) > _release(__version__):
        return f"pip install -U '{_PACKAGE}>={written_by}'"
    return f"pip install -U {_PACKAGE}"


def versions(*others: str) -> dict[str, str]:
    """What decides figures, and what installs it again; and `others` that are installed."""
    packages = {name: version(name) for name in ("torch", "transformers")}
    for name in others:
        with suppress(PackageNotFoundError):
            packages[name] = version(name)
    return {"deltamem": __version__, **packages, "python": platform.python_version()}


def is_newer(version: Any, known: int) -> bool:
    """Whether `version`, as a file says it, is a format after `known`."""
    return type(version) is int and version > known


def _release(version: str) -> list[int]:
    numbers = re.match(r"[0-9.]*[0-9]", version)
    return [int(number) for number in numbers[0].split(".")] if numbers else []

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
# A subset of the version specification of packaging, in ASCII: users may paste the command that it becomes part of.
_VERSION = re.compile(r"[0-9]{1,4}(\.[0-9]{1,4}){1,3}((a|b|rc)[0-9]{1,3})?(\.post[0-9]{1,3})?(\.dev[0-9]{1,4})?")


def update_command(written_by: Any) -> str:
    """The command that installs a version that can read a file, given the version `written_by` that the file records.

    The file is untrusted: the command contains the recorded version only if it is a valid and newer one.
    """
    if isinstance(written_by, str) and _VERSION.fullmatch(written_by) and _release(written_by) > _release(__version__):
        return f"pip install -U '{_PACKAGE}>={written_by}'"
    return f"pip install -U {_PACKAGE}"


def versions(*others: str) -> dict[str, str]:
    """The versions that measured figures depend on, with those of `others` that are installed."""
    packages = {name: version(name) for name in ("torch", "transformers")}
    for name in others:
        with suppress(PackageNotFoundError):
            packages[name] = version(name)
    return {"deltamem": __version__, **packages, "python": platform.python_version()}


def is_newer(version: Any, known: int) -> bool:
    """Return whether the format `version` of a file is newer than `known`."""
    return type(version) is int and version > known


def _release(version: str) -> list[int]:
    numbers = re.match(r"[0-9.]*[0-9]", version)
    return [int(number) for number in numbers[0].split(".")] if numbers else []

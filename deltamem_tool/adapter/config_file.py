"""`deltamem_config.json`: the options of an adapter and the base model it was made for. Imports no torch."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltamem_tool.config import DeltaMemConfig
from deltamem_tool.errors import AdapterError, ConfigError
from deltamem_tool.io.formats import is_newer, update_command
from deltamem_tool.io.safe_json import read_json

CONFIG_FILE, WEIGHTS_FILE = "deltamem_config.json", "deltamem.safetensors"
SUMMARY_FILE, PLOT_FILE = "training.json", "training.png"  # how the adapter was trained
FORMAT, STATIC_FORMAT = "deltamem-adapter", "deltamem-static-adapter"  # the second one is that of `baselines.static`
FORMAT_VERSION = 1
MAX_TEXT = 4096  # characters of a name: the longest path that Linux takes
_REVISION = re.compile(r"(?!.*\.\.)[\w.][\w./-]{0,254}", re.ASCII)


@dataclass(frozen=True)
class BaseModel:
    """The base model that an adapter was made for."""

    name: str  # folder or Hub id
    revision: str | None  # commit on the Hub
    model_type: str
    fingerprint: str  # of its weights, see `checkpoint.fingerprint`

    def __post_init__(self) -> None:
        if not all(isinstance(value, str) for value in (self.name, self.model_type, self.fingerprint)):
            raise TypeError("The name, model_type and fingerprint of the base model must be text")
        if not isinstance(self.revision, str | None):
            raise TypeError("The revision of the base model must be text or null")


@dataclass(frozen=True)
class AdapterConfig:
    """The content of the file."""

    mechanism: DeltaMemConfig
    base: BaseModel
    reference: dict[str, Any] | None  # the record that `reference.convert` kept of the converted adapter


def read_config(folder: Path, name: str | Path, expected: str = FORMAT) -> AdapterConfig:
    """Read the config in `folder`, which must have the format `expected`; error messages call the folder `name`.

    Raises:
        AdapterError: the file is damaged, has a newer format, or is not the config of an adapter.
    """
    file = folder / CONFIG_FILE
    try:
        content = read_json(file)
    except ValueError as error:
        raise AdapterError(f"{file} is not JSON.", f"{error}.", "Fetch the adapter again.") from error
    if not isinstance(content, dict):
        content = {}
    version = content.get("format_version")
    if (content.get("format"), expected) == (STATIC_FORMAT, FORMAT):
        raise AdapterError(
            f"{name} has no memory.",
            "It is a static adapter, a baseline that puts a constant in place of what a memory reads from its state.",
            "Use an adapter with a memory, and pass this one as `deltamem eval --static`.",
        )
    if (content.get("format"), expected) == (FORMAT, STATIC_FORMAT):
        raise AdapterError(
            f"{name} is not a static adapter.",
            "It has a memory.",
            "Train one with the recipe of this memory and `--set static=true`.",
        )
    if content.get("format") != expected or type(version) is not int or version < 1:
        raise AdapterError(
            f"{name} is not an adapter folder.",
            f"{CONFIG_FILE} has another format.",
            "Use another folder.",
        )
    if is_newer(version, FORMAT_VERSION):
        raise AdapterError(
            f"{name} is of adapter format {version}.",
            f"This version of deltamem reads up to {FORMAT_VERSION}.",
            f"Update deltamem-tool: {update_command(content.get('deltamem_version'))}",
        )
    try:
        config = DeltaMemConfig.from_dict(dict(content["mechanism"]))
        base = BaseModel(**content["base"])
        _check_texts(base)
        reference = content.get("reference")
        if not isinstance(reference, dict | None):
            raise TypeError('The entry "reference" must be an object')
    except (ConfigError, KeyError, TypeError, ValueError) as error:
        missing = isinstance(error, KeyError)
        why = f"It has no {error}" if missing else str(error).replace("\n", " ").rstrip(".")
        raise AdapterError(f"{file} is damaged.", f"{why}.", "Fetch the adapter again.") from error
    return AdapterConfig(config, base, reference)


def _check_texts(base: BaseModel) -> None:
    """Check the entries about the base model.

    Raises:
        ValueError: a text is far too long or contains control characters, or the revision is invalid.
    """
    for text in (base.name, base.model_type, base.fingerprint):
        if len(text) > MAX_TEXT or any(unicodedata.category(character) in ("Cc", "Cs") for character in text):
            raise ValueError("A text about the base model is too long, or contains control characters")
    if base.revision is not None and not _REVISION.fullmatch(base.revision):
        raise ValueError("The revision of the base model is invalid")

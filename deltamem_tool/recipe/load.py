"""Read a recipe from a YAML file, override it from the command line, and check all of it.

All errors in a recipe are reported at once, each with its line.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import TypeAdapter, ValidationError

from deltamem_tool.config import PRESETS, DeltaMemConfig
from deltamem_tool.errors import ConfigError, Key, Problem, config_error, problems_of, short_value
from deltamem_tool.io.names import expand_user
from deltamem_tool.recipe.rules import violations
from deltamem_tool.recipe.schema import (
    KNOWN,
    SECTIONS,
    DataOptions,
    LoraOptions,
    ObjectiveOptions,
    Recipe,
    TrainingOptions,
)
from deltamem_tool.recipe.yaml_lines import Document, read_yaml

__all__ = [
    "DataOptions",
    "LoraOptions",
    "ObjectiveOptions",
    "Recipe",
    "TrainingOptions",
    "load_recipe",
    "shipped_recipe",
]

_READER = TypeAdapter(Recipe)
_DEFAULTS = {
    ".".join((*section, entry.name)): entry.default
    for section, kind in [((), Recipe), *(((name,), kind) for name, kind in SECTIONS.items())]
    for entry in fields(kind)
    if entry.default is not MISSING
}


def shipped_recipe(name: str) -> Path:
    """Return the path of a file in `recipes/`, which is in the installed package, or beside it in a working copy."""
    package = Path(__file__).parents[1]
    installed = package / "recipes" / name
    return installed if installed.is_file() else package.parent / "recipes" / name


def load_recipe(path: str | Path, changes: Sequence[str] = (), out: str | None = None) -> Recipe:
    """Read a recipe; `changes` are `key=value` with dotted keys and YAML values, `out` replaces the recipe's.

    Raises:
        ConfigError: the file is missing or not YAML, or contains keys or values that a recipe does not have; its `why`
            has one line an error, with where it is.
    """
    path = expand_user(path)
    if not path.is_file():
        raise ConfigError(
            f"There is no recipe {path}.",
            "It is a folder." if path.is_dir() else "The file does not exist.",
            "Pass the path of a YAML file, such as one of `recipes/`.",
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8.", f"{error}.", "Save the file as UTF-8.") from error
    document = read_yaml(text, str(path))
    content = {} if document.value is None else document.value
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is not a recipe.", "It is not a mapping of keys to values.", "Correct the file.")
    places = {key: _Place(lines[-1], f"line {lines[-1]}") for key, lines in document.lines.items()}
    placed = [(places[key], why) for key, why in _twice(document)]
    for number, change in enumerate(changes):
        place = _Place(1e9 + number, f"--set {change}")
        placed += [(place, why) for why in _apply(content, change, place, places)]
    if out is not None:
        content["out"] = out
        places[("out",)] = _Place(math.inf, "--out")
    problems = _complete_memory(content, places)
    recipe, others = _build(content)
    problems += others
    placed += [(_place(problem.keys, places), problem.why) for problem in problems]
    if recipe is None or placed:
        placed.sort(key=lambda pair: pair[0].order)
        whys = [f"{place.words}: {why}" if place.words else why for place, why in placed]
        raise config_error(f"The recipe {path} is invalid.", whys)
    return recipe


class _Place(NamedTuple):
    order: float
    words: str  # "line 3", "--set training.steps=3"


_NOWHERE = _Place(math.inf, "")


def _place(keys: Sequence[Key], places: Mapping[Key, _Place]) -> _Place:
    """Return the place of the first of `keys` that is given, or else of the section that contains it."""
    present = [key for key in keys if key in places]
    if not present:
        present = [key[:depth] for key in keys for depth in range(len(key), 0, -1) if key[:depth] in places]
    return places[present[0]] if present else _NOWHERE


def _twice(document: Document) -> list[tuple[Key, str]]:
    """Return the keys that are given more than once, each with a message."""
    return [
        (key, f"{'.'.join(key)} is given more than once, first in line {lines[0]}")
        for key, lines in document.lines.items()
        if len(lines) > 1
    ]


def _complete_memory(content: dict[str, Any], places: dict[Key, _Place]) -> list[Problem]:
    """Give options of the memory their names of today, and those of a preset that are not given; say what is wrong."""
    memory = content.get("memory")
    if not isinstance(memory, dict):
        return []
    problems = []
    for old, name in DeltaMemConfig.OLDER_NAMES.items():
        if old not in memory:
            continue
        warnings.warn(f"memory.{old} is now called memory.{name}.", FutureWarning, stacklevel=3)
        if name in memory:
            why = f"memory.{old} is the old name of memory.{name}: leave out one of them"
            problems.append(Problem((("memory", old),), why))
        memory = {name if key == old else key: value for key, value in memory.items()}
        if ("memory", old) in places:
            places["memory", name] = places["memory", old]
    preset = memory.get("preset")
    if preset is not None and preset not in list(PRESETS):
        why = f"memory.preset must be one of {', '.join(PRESETS)}, not {short_value(preset)}"
        problems.append(Problem((("memory", "preset"),), why))
        preset = None
    options = {key: value for key, value in memory.items() if key != "preset"}
    content["memory"] = {**PRESETS[preset], **options} if preset else options
    return problems


def _apply(content: dict[str, Any], change: str, place: _Place, places: dict[Key, _Place]) -> list[str]:
    """Apply `change` to the recipe's content and record its place; return messages about errors in it."""
    words, equals, text = change.partition("=")
    key = tuple(words.strip().split("."))
    if not equals:
        return ["it is not key=value: write for example --set training.steps=100"]
    try:
        document = read_yaml(text, "its value")
    except ConfigError as error:
        return [error.what.rstrip(".")]
    for depth, parent in enumerate(key[:-1], start=1):
        content = content.setdefault(parent, {})
        if not isinstance(content, dict):
            return [f"{'.'.join(key[:depth])} is not a mapping"]
        places.setdefault(key[:depth], place)
    for inside in [known for known in places if known[: len(key)] == key]:
        del places[inside]
    places[key] = place
    content[key[-1]] = document.value
    return [f"{key} is given more than once" for key in {key[-1] for key, _ in _twice(document)}]


def _build(content: dict[str, Any]) -> tuple[Recipe | None, list[Problem]]:
    """Return the recipe, or None, and all problems."""
    recipe, problems = None, []
    try:
        recipe = _READER.validate_python(content)
    except ValidationError as error:
        problems = problems_of(error, KNOWN)
    values = {**_DEFAULTS, **content}
    for name in SECTIONS:
        if isinstance(content.get(name), dict):
            values |= {f"{name}.{key}": value for key, value in content[name].items()}
    for problem in problems:  # what is wrong by itself breaks no rule
        wrong = ".".join(problem.keys[0])
        values = {key: value for key, value in values.items() if not f"{key}.".startswith(f"{wrong}.")}
    values |= {key: content[key] for key in ("lora", "memory") if key in content}  # given is what counts, right or not
    return recipe, [*problems, *violations(values)]

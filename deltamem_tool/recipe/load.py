"""A training run as a YAML file: read, overridden from the command line, checked whole.

Every error of a recipe is reported at once, with its line.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import TypeAdapter, ValidationError

from deltamem_tool.config import NAMES_IN_FILES, PRESETS, DeltaMemConfig
from deltamem_tool.errors import ConfigError
from deltamem_tool.recipe.messages import Problem, config_error, in_words, shown, unknown
from deltamem_tool.recipe.schema import (
    KNOWN,
    DataOptions,
    LoraOptions,
    ObjectiveOptions,
    Recipe,
    TrainingOptions,
    broken,
)
from deltamem_tool.recipe.yaml_lines import Document, Key, read_yaml

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
    f"{kind.SECTION}{entry.name}": entry.default
    for kind in (Recipe, LoraOptions, DataOptions, ObjectiveOptions, TrainingOptions)
    for entry in fields(kind)
    if entry.default is not MISSING
}


def shipped_recipe(name: str) -> Path:
    """A file of `recipes/`: inside the package where it is installed, beside it in a working copy."""
    package = Path(__file__).parents[1]
    installed = package / "recipes" / name
    return installed if installed.is_file() else package.parent / "recipes" / name


def load_recipe(path: str | Path, changes: Sequence[str] = (), out: str | None = None) -> Recipe:
    """Read a recipe; `changes` are `key=value` with dotted keys and YAML values, `out` replaces the recipe's.

    Raises:
        ConfigError: the file is missing or no YAML, or holds keys or values that a recipe does not have; its `why` has
            one line an error, with where it is.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"There is no recipe {path}.", "", "Give the path of a YAML file; `recipes/` has some.")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8.", f"{error}.", "Save the file as UTF-8.") from error
    document = read_yaml(text, str(path))
    said = {} if document.value is None else document.value
    if not isinstance(said, dict):
        raise ConfigError(f"{path} is no recipe.", "It is not a mapping of keys to values.", "Correct the file.")
    places = {key: _Place(lines[-1], f"line {lines[-1]}") for key, lines in document.lines.items()}
    placed = [(places[key], why) for key, why in _twice(document)]
    for number, change in enumerate(changes):
        place = _Place(1e9 + number, f"--set {change}")
        placed += [(place, why) for why in _apply(said, change, place, places)]
    if out is not None:
        said["out"] = out
        places[("out",)] = _Place(math.inf, "--out")
    placed += [(places[key], why) for key, why in _renamed(said, places)]
    recipe, problems = _build(said)
    placed += [(_place(problem.keys, places), problem.why) for problem in problems]
    if recipe is None or placed:
        placed.sort(key=lambda pair: pair[0].order)
        whys = [f"{place.words}: {why}" if place.words else why for place, why in placed]
        raise config_error(f"The recipe {path} does not hold.", whys)
    return recipe


class _Place(NamedTuple):
    order: float
    words: str  # "line 3", "--set training.steps=3"


_NOWHERE = _Place(math.inf, "")


def _place(keys: Sequence[Key], places: Mapping[Key, _Place]) -> _Place:
    """Where the first of `keys` that is given stands; or else what holds it."""
    given = [key for key in keys if key in places]
    if not given:
        given = [key[:depth] for key in keys for depth in range(len(key), 0, -1) if key[:depth] in places]
    return places[given[0]] if given else _NOWHERE


def _twice(document: Document) -> list[tuple[Key, str]]:
    """The keys that are given more than once, and what to say."""
    return [
        (key, f"{'.'.join(key)} is given more than once, first in line {lines[0]}")
        for key, lines in document.lines.items()
        if len(lines) > 1
    ]


def _renamed(said: dict[str, Any], places: dict[Key, _Place]) -> list[tuple[Key, str]]:
    """Give options of the memory that have their older names, which files of adapters have, those that they have now;
    and say of which that cannot be."""
    memory: Any = said.get("memory")
    problems: list[tuple[Key, str]] = []
    for name, old in NAMES_IN_FILES.items() if isinstance(memory, dict) else ():
        if old not in memory:
            continue
        warnings.warn(f"memory.{old} is called memory.{name} now", FutureWarning, stacklevel=4)
        if name in memory:
            problems.append((("memory", old), f"memory.{old} is the old name of memory.{name}: leave out one of them"))
        said["memory"] = memory = {name if key == old else key: value for key, value in memory.items()}
        if ("memory", old) in places:
            places["memory", name] = places["memory", old]
    return problems


def _apply(said: dict[str, Any], change: str, place: _Place, places: dict[Key, _Place]) -> list[str]:
    """Make `change` in what the recipe says, and note its place. What is wrong with it comes back."""
    words, equals, text = change.partition("=")
    key = tuple(words.strip().split("."))
    if not equals:
        return ["it is no key=value: write for example --set training.steps=100"]
    try:
        document = read_yaml(text, "its value")
    except ConfigError as error:
        return [error.what.rstrip(".")]
    for depth, parent in enumerate(key[:-1], start=1):
        said = said.setdefault(parent, {})
        if not isinstance(said, dict):
            return [f"{'.'.join(key[:depth])} has no keys inside"]
        places.setdefault(key[:depth], place)
    for inside in [known for known in places if known[: len(key)] == key]:
        del places[inside]
    places[key] = place
    said[key[-1]] = document.value
    return [f"{key} is given more than once" for key in {key[-1] for key, _ in _twice(document)}]


def _build(said: dict[str, Any]) -> tuple[Recipe | None, list[Problem]]:
    """The recipe, or everything that is wrong with it."""
    memory, problems = _memory(said.get("memory", {}))
    values = dict(_DEFAULTS)
    recipe = None
    try:
        recipe = _READER.validate_python(said | {"memory": memory}, context=values)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            problem = in_words(detail, KNOWN)
            problems.append(problem)
            wrong = ".".join(problem.keys[0])
            values = {key: value for key, value in values.items() if not f"{key}.".startswith(f"{wrong}.")}
    values |= {key: said[key] for key in ("lora", "memory") if key in said}  # given is what counts, right or not
    return recipe, [*problems, *broken(values)]


def _memory(said: Any) -> tuple[DeltaMemConfig, list[Problem]]:
    """The mechanism's options. They say one error at a time: what one is about is left out, and the rest tried."""
    config = DeltaMemConfig()
    if not isinstance(said, dict):
        return config, [Problem((("memory",),), "memory must have keys inside")]
    known = KNOWN[("memory",)]
    problems = [unknown(("memory", str(key)), KNOWN) for key in said if key not in known]
    options = {key: value for key, value in said.items() if key in known}
    preset = options.pop("preset", None)
    if preset is not None and preset not in [*PRESETS]:
        why = f"memory.preset must be one of {', '.join(PRESETS)}, not {shown(preset)}"
        problems.append(Problem((("memory", "preset"),), why))
        preset = None
    left_out: set[str] = set()
    while True:
        try:
            config = DeltaMemConfig(**(PRESETS[preset] if preset else {}) | options)
        except ConfigError as error:
            about = [word for word in re.findall(r"\w+", error.why) if word in known]
            if not left_out.intersection(about):  # else it may be about the default that took its place
                keys = tuple(("memory", word) for word in about)
                problems.append(Problem(keys, f"memory.{error.why.rstrip('.')}"))
            if not options.keys() & about:
                return config, problems
            left_out.update(about)
            options = {key: value for key, value in options.items() if key not in about}
        else:
            return config, problems

"""An ablation as a YAML file: what is changed in which recipe, and what the paper found."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from deltamem_tool.errors import ConfigError
from deltamem_tool.recipe.load import Recipe, load_recipe
from deltamem_tool.recipe.yaml_lines import read_yaml

SEED = "training.seed"  # set for each run
RECIPE = "recipe"  # among a variant's changes: a recipe of its own


class _Paper(BaseModel):
    model_config = ConfigDict(extra="forbid")

    what: str = Field(min_length=1)  # the figures' metric, model and place
    figures: dict[str, float]  # by variant


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    title: str = Field(min_length=1)
    recipe: str = Field(min_length=1)
    variants: dict[str, dict[str, Any] | None] = Field(min_length=2)
    reference: str
    paper: _Paper | None = None

    @model_validator(mode="after")
    def _names(self) -> _File:
        named = {"reference": [self.reference], "paper.figures": [*(self.paper.figures if self.paper else ())]}
        for key, names in named.items():
            for name in names:
                if name not in self.variants:
                    raise ValueError(f"{key} names {name!r}, which is no variant")
        return self


@dataclass(frozen=True)
class Variant:
    """`changes` are `key=value`, as `load_recipe` takes them."""

    name: str
    recipe: Path
    changes: tuple[str, ...]

    def load(self, changes: Sequence[str], seed: int, out: str) -> Recipe:
        """What is trained; `changes` come after the variant's own.

        Raises:
            ConfigError: the recipe does not hold with them.
        """
        return load_recipe(self.recipe, [*self.changes, *changes, f"{SEED}={seed}"], out)


@dataclass(frozen=True)
class Ablation:
    """What differs between adapters, and the variant (`reference`) that the others are compared with."""

    name: str  # of its table and plot: the file's, without its ending
    title: str
    variants: tuple[Variant, ...]
    reference: str
    paper_what: str
    paper: Mapping[str, float]


def read_ablation(file: str | Path) -> Ablation:
    """
    Raises:
        ConfigError: the file is missing, or is none of an ablation.
    """
    file = Path(file)
    if not file.is_file():
        raise ConfigError(f"There is no ablation {file}.", "", "Give YAML files; `recipes/ablations/` has some.")
    try:
        document = read_yaml(file.read_text(encoding="utf-8"), str(file))
        said = _File.model_validate(document.value)
    except (UnicodeDecodeError, ValidationError) as error:
        raise ConfigError(
            f"{file} is no ablation.", _why(error), "Correct it; `recipes/ablations/` has some."
        ) from error
    twice = [".".join(key) for key, lines in document.lines.items() if len(lines) > 1]
    if twice:
        raise ConfigError(f"{file} is no ablation.", f"{twice[0]} is given more than once.", "Leave one.")
    variants = tuple(_variant(file, said.recipe, name, changes or {}) for name, changes in said.variants.items())
    paper = said.paper or _Paper(what="the paper", figures={})
    return Ablation(file.stem, said.title, variants, said.reference, paper.what, paper.figures)


def _why(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return f"{error}."
    lines = []
    for detail in error.errors(include_url=False):
        where = ".".join(map(str, detail["loc"]))
        lines.append(f"{where}: {detail['msg']}." if where else f"{detail['msg']}.")
    return "\n".join(lines)


def _variant(file: Path, recipe: str, name: str, changes: Mapping[str, Any]) -> Variant:
    own = str(changes.get(RECIPE, recipe))
    said = tuple(f"{key}={json.dumps(value)}" for key, value in changes.items() if key != RECIPE)
    return Variant(name, file.parent / own, said)

"""Read an ablation from a YAML file: a recipe, its variants, and the paper's figures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from deltamem_tool.errors import ConfigError, config_error, problems_of
from deltamem_tool.recipe.load import Recipe, load_recipe
from deltamem_tool.recipe.yaml_lines import read_yaml

SEED = "training.seed"  # set for each run
RECIPE = "recipe"  # key among a variant's changes that names another recipe


class _Paper(BaseModel):
    model_config = ConfigDict(extra="forbid")

    what: str = Field(min_length=1)  # metric, model and place of the figures
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
                    raise ValueError(f"{key} names {name!r}, which is not a variant")
        return self


_KNOWN = {(): list(_File.model_fields), ("paper",): list(_Paper.model_fields)}


@dataclass(frozen=True)
class Variant:
    """A variant of a recipe. `changes` are `key=value`, as in `load_recipe`."""

    name: str
    recipe: Path
    changes: tuple[str, ...]

    def load(self, changes: Sequence[str], seed: int, out: str) -> Recipe:
        """Return the recipe to train. `changes` override those of the variant.

        Raises:
            ConfigError: the changed recipe is invalid.
        """
        return load_recipe(self.recipe, [*self.changes, *changes, f"{SEED}={seed}"], out)


@dataclass(frozen=True)
class Ablation:
    """The variants to compare, and the one (`reference`) that the others are compared with."""

    name: str  # name of table and plot: that of the file, without its extension
    title: str
    variants: tuple[Variant, ...]
    reference: str
    paper_what: str
    paper: Mapping[str, float]


def read_ablation(file: str | Path) -> Ablation:
    """Read and check an ablation file.

    Raises:
        ConfigError: the file is missing, or is not a valid ablation.
    """
    file = Path(file)
    if not file.is_file():
        raise ConfigError(f"Ablation {file} not found.", "", "Pass YAML files, such as those of `recipes/ablations/`.")
    try:
        document = read_yaml(file.read_text(encoding="utf-8"), str(file))
        content = _File.model_validate(document.value)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not UTF-8.", f"{error}.", "Save the file as UTF-8.") from error
    except ValidationError as error:
        whys = [problem.why for problem in problems_of(error, _KNOWN)]
        raise config_error(f"{file} is not a valid ablation.", whys) from error
    twice = [".".join(key) for key, lines in document.lines.items() if len(lines) > 1]
    if twice:
        raise ConfigError(f"{file} is not a valid ablation.", f"{twice[0]} is repeated.", "Keep one.")
    variants = tuple(_variant(file, content.recipe, name, changes or {}) for name, changes in content.variants.items())
    paper = content.paper or _Paper(what="the paper", figures={})
    return Ablation(file.stem, content.title, variants, content.reference, paper.what, paper.figures)


def _variant(file: Path, recipe: str, name: str, changes: Mapping[str, Any]) -> Variant:
    path = str(changes.get(RECIPE, recipe))
    settings = tuple(f"{key}={json.dumps(value)}" for key, value in changes.items() if key != RECIPE)
    return Variant(name, file.parent / path, settings)

"""A training run as a YAML file: read, overridden from the command line, checked whole."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from deltamem_tool.config import DeltaMemConfig
from deltamem_tool.dialogues import KIND_OF
from deltamem_tool.errors import ConfigError

SCHEDULERS = ("linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt")  # of transformers' Trainer


@dataclass(frozen=True)
class DataOptions:
    """Where episodes come from: `path`, a JSONL file of conversations, or else generated dialogues."""

    path: str | None = None
    facts_first: int = 2  # generated: the most facts in an episode at the start of training
    facts_last: int = 6  # and once grown
    growth: float = 0.5  # share of training over which it grows
    fewest: float = 0.0  # generated: an episode has at least this share of the most facts there may be
    replies: float = 0.0  # generated: share of the episodes that also train a reply which needs no memory
    max_write_tokens: int = 8192
    max_read_tokens: int = 512


@dataclass(frozen=True)
class TrainingOptions:
    steps: int = 70
    batch_size: int = 32
    gradient_accumulation: int = 1
    learning_rate: float = 2e-4
    scheduler: str = "cosine"
    warmup: float = 0.1  # share of the steps
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    seed: int = 42
    save_every: int = 500  # steps between checkpoints


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a training run.

    Args:
        base: folder or Hub id of the frozen model; `builtin:backbone` is the one the package ships.
        out: the adapter folder to write.
        revision: of the base on the Hub.
        adapter: an adapter folder to start from; `memory` is then its own.
        memory: the mechanism.
    """

    base: str
    out: str
    revision: str | None = None
    adapter: str | None = None
    memory: DeltaMemConfig = field(default_factory=DeltaMemConfig)
    data: DataOptions = field(default_factory=DataOptions)
    training: TrainingOptions = field(default_factory=TrainingOptions)

    def __post_init__(self) -> None:
        training, data = self.training, self.data
        checks = [
            (training.steps >= 1, "training.steps must be 1 or more"),
            (training.batch_size >= 1, "training.batch_size must be 1 or more"),
            (training.gradient_accumulation >= 1, "training.gradient_accumulation must be 1 or more"),
            (training.learning_rate > 0, "training.learning_rate must be above 0"),
            (0 <= training.warmup < 1, "training.warmup is a share of the steps, 0 to 1"),
            (training.scheduler in SCHEDULERS, f"training.scheduler must be one of {', '.join(SCHEDULERS)}"),
            (training.save_every >= 1, "training.save_every must be 1 or more"),
            (1 <= data.facts_first <= data.facts_last, "data.facts_first must be 1 up to data.facts_last"),
            (data.facts_last <= len(KIND_OF), f"data.facts_last must be {len(KIND_OF)} or less"),
            (data.max_write_tokens >= 1, "data.max_write_tokens must be 1 or more"),
            (data.max_read_tokens >= 1, "data.max_read_tokens must be 1 or more"),
            (0 <= data.growth <= 1, "data.growth is a share of the training, 0 to 1"),
            (0 <= data.fewest <= 1, "data.fewest is a share of the facts, 0 to 1"),
            (0 <= data.replies <= 1, "data.replies is a share of the episodes, 0 to 1"),
        ]
        wrong = [why for holds, why in checks if not holds]
        if wrong:
            raise ConfigError("The recipe does not hold.", "; ".join(wrong) + ".", "Correct it and try again.")


def shipped_recipe(name: str) -> Path:
    """A file of `recipes/`: inside the package where it is installed, beside it in a working copy."""
    package = Path(__file__).parent
    installed = package / "recipes" / name
    return installed if installed.is_file() else package.parent / "recipes" / name


def load_recipe(path: str | Path, changes: Sequence[str] = (), out: str | None = None) -> Recipe:
    """Read a recipe; `changes` are `key=value` with dotted keys and YAML values, `out` replaces the recipe's.

    Raises:
        ConfigError: the file is missing or no YAML, or holds keys or values that a recipe does not have.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"There is no recipe {path}.", "", "Give the path of a YAML file; `recipes/` has some.")
    try:
        said = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        why = " ".join(str(error).split())
        raise ConfigError(f"{path} is not YAML.", f"{why}.", "Correct the file.") from error
    if not isinstance(said, dict):
        raise ConfigError(f"{path} is no recipe.", "It is not a mapping of keys to values.", "Correct the file.")
    for change in changes:
        _apply(said, change)
    if out is not None:
        said["out"] = out
    return _build(Recipe, said, "")


def _apply(said: dict[str, Any], change: str) -> None:
    key, equals, value = change.partition("=")
    if not equals:
        raise ConfigError(f"--set {change} is no key=value.", "", "Write for example --set training.steps=100.")
    *parents, last = key.strip().split(".")
    for parent in parents:
        said = said.setdefault(parent, {})
        if not isinstance(said, dict):
            raise ConfigError(f"--set {change}: {parent!r} has no keys inside.", "", "Correct the key.")
    try:
        said[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {change}: the value is not YAML.", "", "Quote it, or correct it.") from error


def _build(kind: type, said: Mapping[str, Any], prefix: str) -> Any:
    """An instance of the dataclass `kind` from a mapping, strictly."""
    if kind is DeltaMemConfig:
        options = dict(said)
        preset = options.pop("preset", None)
        return DeltaMemConfig.from_dict(options) if preset is None else DeltaMemConfig.preset(preset, **options)
    hints = get_type_hints(kind)
    known = [entry.name for entry in fields(kind)]
    values: dict[str, Any] = {}
    for key, value in said.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1) or ([] if prefix else _elsewhere(str(key)))
            raise ConfigError(
                f"The recipe key {prefix}{key} is not known.",
                f"Did you mean {prefix}{near[0]}?" if near else f"Known here: {', '.join(known)}.",
                "Correct the recipe.",
            )
        hint = hints[key]
        if is_dataclass(hint):
            if not isinstance(value, dict):
                raise ConfigError(f"The recipe key {prefix}{key} needs keys inside.", "", "Correct the recipe.")
            values[key] = _build(hint, value, f"{prefix}{key}.")  # type: ignore[arg-type]
        else:
            if isinstance(value, int) and not isinstance(value, bool) and hint is float:
                value = float(value)
            if isinstance(value, str) and hint is float:
                value = _number(value)  # YAML 1.1 reads 2e-4 as text
            finite = not isinstance(value, float) or math.isfinite(value)
            if not finite or not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
                wanted = getattr(hint, "__name__", str(hint))
                raise ConfigError(f"The recipe key {prefix}{key} must be {wanted}, not {value!r}.", "", "Correct it.")
            values[key] = value
    missing = [name for name in ("base", "out") if kind is Recipe and name not in values]
    if missing:
        raise ConfigError(f"The recipe lacks {' and '.join(missing)}.", "", "Add it, or pass --out for `out`.")
    return kind(**values)


def _elsewhere(key: str) -> list[str]:
    """The section that has `key`, for someone who left the section out."""
    sections = {"memory": DeltaMemConfig, "data": DataOptions, "training": TrainingOptions}
    return [f"{name}.{key}" for name, kind in sections.items() if key in {entry.name for entry in fields(kind)}]


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text

"""A short training run with evaluations, and the files that it writes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from training.talks import write_talks

from deltamem_tool import DeltaMemConfig
from deltamem_tool.adapter.config_file import SUMMARY_FILE
from deltamem_tool.adapter.folder import read_adapter
from deltamem_tool.recipe.load import DataOptions, Recipe, TrainingOptions


def short_run(base: Path, folder: Path) -> Recipe:
    """Six steps on a file, which is also the evaluation data."""
    talks = str(write_talks(folder / "talks.jsonl"))
    return Recipe(
        base=str(base),
        out=str(folder / "adapter"),
        memory=DeltaMemConfig(rank=4),
        data=DataOptions(path=talks, eval_path=talks, max_write_tokens=200, max_read_tokens=90),
        training=TrainingOptions(steps=6, batch_size=4, learning_rate=1e-2, eval_every=2, eval_episodes=6),
    )


def changed(recipe: Recipe, **training) -> Recipe:
    return dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, **training))


def summary(recipe: Recipe) -> dict:
    return json.loads((read_adapter(recipe.out).path / SUMMARY_FILE).read_text())

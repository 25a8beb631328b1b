"""Training whose checkpoints take long to write, so that kills find them half-way."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from deltamem_tool.recipe.load import load_recipe
from deltamem_tool.training import train

_save = torch.save


def _slow(content, path, *args, **options):
    _save(content, path, *args, **options)
    with Path(path).open("r+b") as file:
        whole = file.read()
        file.seek(0)
        file.truncate()
        file.write(whole[: len(whole) // 2])
        file.flush()
        time.sleep(0.05)
        file.write(whole[len(whole) // 2 :])


def train_slowly(recipe: Path, resume: bool) -> None:
    torch.save = _slow
    train(load_recipe(recipe), resume=resume)

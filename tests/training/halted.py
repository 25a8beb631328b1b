"""Training that stops in the middle of writing a checkpoint, so that a test can kill it there."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import torch

from deltamem_tool.recipe.load import load_recipe
from deltamem_tool.training import train

LONG = 3600.0  # seconds; the process is killed before


def train_until(recipe: Path, resume: bool, file: int, halted: Path) -> None:
    """Halt when half of the `file`-th file that torch writes, counted from 1, is on disk, and create `halted`."""
    save, numbers = torch.save, itertools.count(1)

    def save_or_halt(content, path, *args, **options):
        save(content, path, *args, **options)
        if next(numbers) == file:
            whole = Path(path).read_bytes()
            Path(path).write_bytes(whole[: len(whole) // 2])
            halted.touch()
            time.sleep(LONG)

    torch.save = save_or_halt
    train(load_recipe(recipe), resume=resume)

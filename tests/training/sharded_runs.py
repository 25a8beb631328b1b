"""Training functions run by the processes of a launch; a forked process can import them."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import PreTrainedModel

from deltamem_tool.errors import DeltaMemError
from deltamem_tool.recipe.load import Recipe
from deltamem_tool.training import train
from deltamem_tool.training.sharding import is_sharded


def trained(recipes: list[Recipe], notes: Path) -> None:
    """Train the recipes sequentially. The main process writes a line per recipe to `notes`."""
    torch.set_num_threads(1)
    for recipe in recipes:
        shares = []
        with whole_bytes() as whole:
            result = train(recipe, sharded=shares.append)
        if os.environ["RANK"] == "0":
            share = dataclasses.asdict(shares[0])
            with notes.open("a") as file:
                file.write(json.dumps({"losses": result.losses, "share": share, "whole": max(whole)}) + "\n")


def trained_apart(recipe: Recipe, notes: Path) -> None:
    """Train with the whole base in each process, and write the losses to `notes`."""
    torch.set_num_threads(1)
    result = train(recipe)
    if result.is_main:
        notes.write_text(json.dumps(result.losses))


def loses_another(recipe: Recipe, errors: Path) -> None:
    """Train, and write the error that ends the run to `errors`."""
    torch.set_num_threads(1)
    try:
        train(recipe)
    except DeltaMemError as error:
        errors.write_text(str(error))


@contextmanager
def whole_bytes() -> Iterator[list[int]]:
    """The bytes of the base's unsharded weights, each time that one of its attention modules runs."""
    models: list[PreTrainedModel] = []
    sizes: list[int] = []

    def look(module: torch.nn.Module, args: tuple) -> None:
        if isinstance(module, PreTrainedModel) and is_sharded(module):
            models[:] = [module]
        elif hasattr(module, "q_proj"):
            sizes.append(sum(w.nbytes for w in models[0].parameters() if not isinstance(w, DTensor)))

    handle = register_module_forward_pre_hook(look)
    try:
        yield sizes
    finally:
        handle.remove()

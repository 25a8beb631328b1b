"""The duration of a run is estimated beforehand, and the estimate does not change the run."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from safetensors.torch import load_file
from training.talks import write_talks

from deltamem_tool import DeltaMemConfig
from deltamem_tool.adapter.config_file import WEIGHTS_FILE
from deltamem_tool.cli.console import duration_text
from deltamem_tool.recipe.load import DataOptions, LoraOptions, Recipe, TrainingOptions
from deltamem_tool.training import train


@pytest.fixture
def recipe(checkpoint, tmp_path):
    return Recipe(
        base=str(checkpoint),
        out=str(tmp_path / "adapter"),
        memory=DeltaMemConfig(rank=4),
        data=DataOptions(path=str(write_talks(tmp_path / "talks.jsonl")), max_write_tokens=200, max_read_tokens=90),
        training=TrainingOptions(steps=4, batch_size=3, gradient_accumulation=2),
    )


@pytest.mark.slow
def test_an_estimate_does_not_change_the_run(recipe, tmp_path):
    estimates = []
    train(recipe, expecting=lambda steps, seconds: estimates.append((steps, seconds)))
    ((steps, seconds),) = estimates
    assert steps == 4 and seconds > 0
    other = dataclasses.replace(recipe, out=str(tmp_path / "other"))
    train(other)
    weights, expected = (load_file(f"{each.out}/{WEIGHTS_FILE}") for each in (recipe, other))
    assert all(torch.equal(weights[name], weight) for name, weight in expected.items())


@pytest.mark.slow
def test_an_estimate_does_not_change_dropout(recipe, tmp_path):
    lora = dataclasses.replace(recipe, memory=DeltaMemConfig(), lora=LoraOptions(rank=4, dropout=0.5))
    other = dataclasses.replace(lora, out=str(tmp_path / "other"))
    assert train(lora, expecting=lambda steps, seconds: None).losses == train(other).losses


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.2, "about 2 seconds"),
        (45, "about 45 seconds"),
        (89, "about 89 seconds"),
        (100, "about 2 minutes"),
        (3600, "about 60 minutes"),
        (9000, "about 2.5 hours"),
        (100_000, "about 28 hours"),
    ],
)
def test_duration_text(seconds, words):
    assert duration_text(seconds) == words

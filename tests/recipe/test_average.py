"""`recipes/average.py`: interpolates two adapters, and rejects two that do not belong together."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
from helpers.tiny import randomise, save_checkpoint
from transformers import AutoModelForCausalLM

import deltamem_tool as deltamem
from deltamem_tool.adapter.folder import read_adapter

SCRIPT = Path(__file__).parents[2] / "recipes" / "average.py"
TOLERANCE = 2e-3  # float16, for weights below 4


def average(*arguments):
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def adapters(folder, *options):
    """An adapter for each of `options`, on one base, with different weights."""
    base = save_checkpoint(folder / "base")
    for seed, each in enumerate(options):
        model = AutoModelForCausalLM.from_pretrained(base)
        randomise(deltamem.attach(model, deltamem.DeltaMemConfig(**each)), seed)
        deltamem.save_adapter(model, folder / f"adapter-{seed}")
        yield folder / f"adapter-{seed}"


def test_weights_are_interpolated_by_the_given_share(tmp_path):
    first, second = adapters(tmp_path, {"rank": 4}, {"rank": 4})
    result = average(first, second, tmp_path / "between", "--share", 0.25)
    assert result.returncode == 0, result.stderr
    a, b, between = (read_adapter(folder) for folder in (first, second, tmp_path / "between"))
    assert (between.config, between.base) == (a.config, a.base)
    for name, weight in between.numbers().items():
        expected = a.numbers()[name] + 0.25 * (b.numbers()[name] - a.numbers()[name])
        np.testing.assert_allclose(weight, expected, atol=TOLERANCE, rtol=0)
    deltamem.load(tmp_path / "between")


def test_averaging_different_mechanisms_raises(tmp_path):
    first, second = adapters(tmp_path, {"rank": 4}, {"rank": 8})
    result = average(first, second, tmp_path / "between")
    assert result.returncode != 0 and "differ in their mechanism" in result.stderr
    assert not (tmp_path / "between").exists()

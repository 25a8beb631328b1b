"""The recipes of this repository: each is valid, says how to run it, and is in the installed package."""

from __future__ import annotations

import fnmatch
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import yaml

from deltamem_tool import DeltaMemConfig
from deltamem_tool.config import PRESETS
from deltamem_tool.recipe.load import load_recipe, shipped_recipe

ROOT = Path(__file__).parents[2]
SHARDED = "qwen2.5-72b-instruct-msw"  # which runs in several processes
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))

ON_THE_BACKBONE = (
    "ablation",
    "quickstart",
    "adapter",
    "adapter-unknown",
    "learn-tsw",
    "learn-ssw",
    "learn-msw",
    "learn-lora",
)
ON_SMOLLM2 = (
    *(f"smollm2-135m-msw{stage}" for stage in ("", "-chats", "-more", "-keep", "-talk")),
    *(f"smollm2-135m-tsw{stage}" for stage in ("", "-talk", "-replies", "-answers", "-untold")),
    "smollm2-135m-ssw",
)
BASES = {
    "qwen3-4b-instruct": "Qwen/Qwen3-4B-Instruct-2507",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "smollm3-3b": "HuggingFaceTB/SmolLM3-3B",
}
PROCESSES = yaml.safe_load((ROOT / "recipes" / "accelerate" / "fsdp2.yaml").read_text())["num_processes"]


@pytest.mark.parametrize("path", [path for path in RECIPES if path.stem != SHARDED], ids=lambda path: path.stem)
def test_a_shipped_recipe_can_be_read(path):
    read = load_recipe(path)
    header = re.match(r"(?:#.*\n)+", path.read_text(encoding="utf-8"))
    assert header is not None
    commands = re.findall(r"^#   (deltamem .*)$", header[0], flags=re.MULTILINE)
    goes_on = read.adapter is not None  # starts from the result of another recipe, whose command comes first
    command, verb, *words = shlex.split(commands[-1 if goes_on else 0])
    assert (command, verb, words[0]) == ("deltamem", "train", f"recipes/{path.name}")
    load_recipe(path, words[2::2])
    assert set(words[1::2]) <= {"--set"}
    assert re.search(r"^# Planned for .*(cores|GPU)", header[0], flags=re.MULTILINE) and "emory" in header[0]
    if path.stem in ON_THE_BACKBONE:
        assert read.base == "builtin:backbone" and read.training.steps
        return
    if path.stem in ON_SMOLLM2:
        assert (read.base, read.out) == ("HuggingFaceTB/SmolLM2-135M-Instruct", path.stem)
        return
    model, _, way = path.stem.rpartition("-")
    assert (read.base, read.out) == (BASES[model], path.stem)
    assert read.training.batch_size * read.training.gradient_accumulation == 32
    assert (read.training.dtype, read.training.learning_rate, read.training.warmup) == ("bfloat16", 2e-4, 0.1)
    assert (read.lora is not None) == (way == "lora")
    if way != "lora":
        assert read.memory == DeltaMemConfig.preset(way, alpha=16)
        assert (read.objective.write_sparsity, read.objective.write_target) == (0.01, 0.05)


def test_the_recipe_for_a_sharded_base_can_be_read():
    path = shipped_recipe(f"{SHARDED}.yaml")
    read = load_recipe(path)
    assert (read.base, read.out, read.training.shard) == ("Qwen/Qwen2.5-72B-Instruct", SHARDED, "fsdp2")
    assert read.training.batch_size * read.training.gradient_accumulation * PROCESSES == 32
    assert (read.training.dtype, read.training.gradient_checkpointing) == ("bfloat16", True)
    assert read.memory == DeltaMemConfig.preset("msw", alpha=16)
    header = path.read_text(encoding="utf-8").partition("\nbase:")[0]
    assert "accelerate launch --config_file recipes/accelerate/fsdp2.yaml -m deltamem_tool train" in header
    assert f"recipes/{path.name} --dry-run --processes {PROCESSES}" in header and "emory: " in header


def test_the_package_contains_every_recipe():
    names = {f"{model}-{way}" for model in BASES for way in PRESETS}
    assert {path.stem for path in RECIPES} == names | {"qwen3-4b-instruct-lora", SHARDED, *ON_THE_BACKBONE, *ON_SMOLLM2}
    setuptools_options = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    patterns = setuptools_options["package-data"]["deltamem_tool.recipes"]
    assert "deltamem_tool.recipes" in setuptools_options["packages"]
    for path in RECIPES:
        assert any(fnmatch.fnmatch(path.name, pattern) for pattern in patterns)
        assert shipped_recipe(path.name).is_file()

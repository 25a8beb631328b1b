"""`deltamem train` on a sharded base: the output of a dry run, and short errors."""

from __future__ import annotations

import pytest
import yaml
from helpers.tiny import save_checkpoint

from deltamem_tool.training import peak_bytes


@pytest.fixture
def recipe(tmp_path):
    base = save_checkpoint(tmp_path / "base")
    path = tmp_path / "recipe.yaml"
    training = {"steps": 2, "shard": "fsdp2"}
    path.write_text(yaml.safe_dump({"base": str(base), "out": str(tmp_path / "adapter"), "training": training}))
    return path


def test_a_dry_run_prints_the_memory_per_process(deltamem, recipe, monkeypatch):
    monkeypatch.setattr(peak_bytes, "step_peaks", lambda *_: {"forward": 1})
    result = deltamem("train", recipe, "--dry-run", "--processes", 8)
    assert result.code == 0
    assert "its part of" in result.out and "weights gathered to compute" in result.out


def test_sharding_with_one_process_is_rejected(deltamem, recipe):
    for words in ([], ["--dry-run"]):
        deltamem("train", recipe, *words).assert_short_error("FSDP2 needs several processes", "accelerate launch")


def test_the_error_says_how_to_launch_processes(deltamem, recipe):
    deltamem("train", recipe, "--processes", 2).assert_short_error("--processes is about a dry run", code=2)


def test_deepspeed_zero_is_rejected(deltamem, recipe, monkeypatch):
    """A configuration of accelerate that asks for ZeRO-3 does not lead to a data-parallel run."""
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    deltamem("train", recipe).assert_short_error("DeepSpeed is not supported.", "FSDP2 shards the base", code=1)

"""A launcher's configuration is followed or rejected, never replaced by something else."""

from __future__ import annotations

import pytest

from deltamem_tool.errors import ConfigError
from deltamem_tool.recipe.load import LoraOptions, Recipe, TrainingOptions
from deltamem_tool.training.launch import asks_to_shard, check_shards, join_launch


def recipe(**training) -> Recipe:
    return Recipe(base="base", out="out", training=TrainingOptions(steps=1, **training))


def test_fsdp2_is_requested_by_recipe_or_launcher(monkeypatch):
    assert not asks_to_shard(recipe())
    assert asks_to_shard(recipe(shard="fsdp2"))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert asks_to_shard(recipe())


@pytest.mark.parametrize("variable", ["DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"])
def test_other_engines_raise(variable, monkeypatch):
    """DeepSpeed's ZeRO-3 among them: data parallel in its place would not fit on a GPU."""
    monkeypatch.setenv(f"ACCELERATE_USE_{variable}", "true")
    with pytest.raises(ConfigError, match="is not supported") as raised:
        join_launch(recipe())
    assert "recipes/accelerate/fsdp2.yaml" in raised.value.next


def test_fsdp_version_1_raises(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(ConfigError, match=r"^FSDP 1 is not supported\."):
        join_launch(recipe())


def test_fsdp2_with_one_process_raises():
    with pytest.raises(ConfigError, match=r"^FSDP2 needs several processes, but this is the only one\."):
        join_launch(recipe(shard="fsdp2"))


def test_more_processes_than_gpus_raise(monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(ConfigError, match=r"^8 processes were started for 2 GPUs\."):
        join_launch(recipe())


def test_sharding_an_int8_base_raises():
    for quantize in ("none", "nf4"):
        check_shards(recipe(quantize=quantize), 2)
    with pytest.raises(ConfigError, match=r"^A base quantised to int8 cannot be sharded\."):
        check_shards(recipe(quantize="int8"), 2)


def test_training_a_lora_on_a_sharded_base_raises():
    with pytest.raises(ConfigError, match=r"^A LoRA cannot be trained on a sharded base\."):
        check_shards(Recipe(base="base", out="out", lora=LoraOptions(), training=TrainingOptions(steps=1)), 2)

"""Decide whether the processes of a launch share one base model or have one each."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from accelerate import PartialState

from deltamem_tool.base_model.launch import join, launch_world_size
from deltamem_tool.errors import ConfigError
from deltamem_tool.recipe.load import Recipe

SHARD_COMMAND = "accelerate launch --config_file recipes/accelerate/fsdp2.yaml -m deltamem_tool train RECIPE"
# Engines that `accelerate launch` says to use by these variables.
_FSDP = "ACCELERATE_USE_FSDP"
_REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "A parallelism_config",
}


@dataclass(frozen=True)
class Launch:
    """How the processes of a launch work together."""

    state: PartialState
    shards: bool  # FSDP2 of the base; else each process has a whole one
    offloads: bool = False  # its part of the base waits in the CPU's memory

    @property
    def processes(self) -> int:
        """The number of processes."""
        return int(self.state.num_processes)


def join_launch(recipe: Recipe) -> Launch:
    """Join the processes of a launch, on GPUs if there are any and on CPUs otherwise; or run as a single process.

    Raises:
        ConfigError: the recipe or the launcher's configuration asks for sharding that this run does not support.
        DeltaMemError: the other processes did not connect.
    """
    shards, count = asks_to_shard(recipe), launch_world_size()
    _check_devices(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if shards:
        check_shards(recipe, count)
    offloads = _is_set(_FSDP) and _is_set("FSDP_OFFLOAD_PARAMS")
    # The Trainer must not wrap the adapter: the base is sharded while it loads. The recipe's dtype is the base's, and
    # the memory is float32.
    for variable in (_FSDP, "ACCELERATE_MIXED_PRECISION"):
        os.environ.pop(variable, None)
    state = join()
    return Launch(state, shards, offloads)


def asks_to_shard(recipe: Recipe) -> bool:
    """Return whether the recipe or the launcher's configuration asks for FSDP2.

    Raises:
        ConfigError: the configuration asks for another engine.
    """
    for variable, engine in _REFUSED.items():
        if _is_set(variable):
            raise ConfigError(
                f"{engine} is not supported.",
                "It splits and runs the model that it gets, which here is only the adapter.",
                f"FSDP2 shards the base: {SHARD_COMMAND}",
            )
    if _is_set(_FSDP) and os.environ.get("FSDP_VERSION", "1") != "2":
        raise ConfigError(
            "FSDP 1 is not supported.",
            "accelerate's configuration asks for it, but torch has replaced it with FSDP 2.",
            "Set fsdp_version: 2 under fsdp_config, or use recipes/accelerate/fsdp2.yaml.",
        )
    return _is_set(_FSDP) or recipe.training.shard == "fsdp2"


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() == "true"


def _check_devices(processes: int) -> None:
    devices = torch.accelerator.device_count() if torch.accelerator.is_available() else processes
    if processes > devices:
        raise ConfigError(
            f"{processes} processes were started for {devices} GPUs.",
            "Each process needs its own GPU.",
            f"Set num_processes or --nproc-per-node to {devices}.",
        )


def check_shards(recipe: Recipe, processes: int) -> None:
    """Check that the base model of `recipe` can be sharded.

    Raises:
        ConfigError: it cannot be, or there is only one process.
    """
    if processes == 1:
        raise ConfigError(
            "FSDP2 needs several processes, but this is the only one.",
            "The recipe or accelerate's configuration says to shard the base.",
            f"Run {SHARD_COMMAND}, with two processes or more.",
        )
    if recipe.training.quantize == "int8":
        raise ConfigError(
            "A base quantised to int8 cannot be sharded.",
            "bitsandbytes keeps the scales of the rows in the weight, and FSDP2 replaces it with a plain weight.",
            "Set training.quantize to nf4 or none, or training.shard to none.",
        )
    if recipe.lora is not None:
        raise ConfigError(
            "A LoRA cannot be trained on a sharded base.",
            "Its weights are inside the base's layers.",
            "Leave out lora, or train it without sharding.",
        )

"""The processes that a launcher has started, and whether they share one base model or have one each."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState

from deltamem_tool.errors import ConfigError, DeltaMemError, first_line
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
    """What the processes do together."""

    state: PartialState
    shards: bool  # FSDP2 of the base; else each process has a whole one
    offloads: bool = False  # its part of the base waits in the CPU's memory

    @property
    def processes(self) -> int:
        """How many there are."""
        return int(self.state.num_processes)


def launched(recipe: Recipe) -> Launch:
    """Join the processes of a launch, on GPUs if there are any, else on CPUs; or be the only one.

    Raises:
        ConfigError: the recipe or the launcher's configuration asks for sharding that this run cannot have.
        DeltaMemError: the other processes did not come.
    """
    shards, count = asks_to_shard(recipe), processes_of_launch()
    _check_devices(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if shards:
        check_shards(recipe, count)
    offloads = _is_set(_FSDP) and _is_set("FSDP_OFFLOAD_PARAMS")
    # The Trainer must not wrap the adapter: the base is sharded while it loads. The recipe's dtype is the base's, and
    # the memory is float32.
    for variable in (_FSDP, "ACCELERATE_MIXED_PRECISION"):
        os.environ.pop(variable, None)
    try:
        state = PartialState(cpu=True) if on_cpus() else PartialState()
    except torch.distributed.DistError as error:
        raise DeltaMemError(
            f"The {count} processes of this run did not find each other.",
            f"{first_line(error)}.",
            "Start as many as the launcher's configuration says, with the same address and port.",
        ) from error
    return Launch(state, shards, offloads)


def processes_of_launch() -> int:
    """How many processes the launcher of this one has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def asks_to_shard(recipe: Recipe) -> bool:
    """Whether the recipe or the launcher's configuration asks for FSDP2.

    Raises:
        ConfigError: the configuration asks for another engine.
    """
    for variable, engine in _REFUSED.items():
        if _is_set(variable):
            raise ConfigError(
                f"{engine} is not supported.",
                "It splits and runs the model that it is given, and here that is the adapter alone.",
                f"FSDP2 shards the base: {SHARD_COMMAND}",
            )
    if _is_set(_FSDP) and os.environ.get("FSDP_VERSION", "1") != "2":
        raise ConfigError(
            "FSDP 1 is not supported.",
            "accelerate's configuration asks for it, and torch has replaced it by FSDP 2.",
            "Set fsdp_version: 2 under fsdp_config, or use recipes/accelerate/fsdp2.yaml.",
        )
    return _is_set(_FSDP) or recipe.training.shard == "fsdp2"


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() == "true"


def on_cpus() -> bool:
    """Whether several processes run without GPUs."""
    return processes_of_launch() > 1 and not torch.accelerator.is_available()


def _check_devices(processes: int) -> None:
    devices = torch.accelerator.device_count() if torch.accelerator.is_available() else processes
    if processes > devices:
        raise ConfigError(
            f"{processes} processes were started for {devices} GPUs.",
            "Each needs one of its own.",
            f"Set num_processes or --nproc-per-node to {devices}.",
        )


def check_shards(recipe: Recipe, processes: int) -> None:
    """Check that the base of `recipe` can be sharded.

    Raises:
        ConfigError: it cannot, or there is one process alone.
    """
    if processes == 1:
        raise ConfigError(
            "FSDP2 needs several processes, and this is the only one.",
            "The recipe or accelerate's configuration says to shard the base.",
            f"Run {SHARD_COMMAND}, with two processes or more.",
        )
    if recipe.training.quantize == "int8":
        raise ConfigError(
            "An int8 base cannot be sharded.",
            "bitsandbytes keeps a second reference to int8 weights, which FSDP2 does not see.",
            "Set training.quantize to nf4 or none.",
        )


@contextmanager
def naming_lost_processes(run: Path) -> Iterator[None]:
    """Say of an error of torch.distributed inside that another process has ended; `run` has the checkpoints."""
    try:
        yield
    except torch.distributed.DistError as error:
        raise DeltaMemError(
            "Another process of this run has ended.",
            f"{first_line(error)}.",
            f"The launcher names it. Whole checkpoints are in {run}; --resume goes on from the last.",
        ) from error

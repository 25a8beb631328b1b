"""The processes that a launcher has started, and whether they share one base model or have one each."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from deltamem_tool.errors import ConfigError, DeltaMemError, first_line
from deltamem_tool.recipe.load import Recipe

SHARD_COMMAND = "accelerate launch --config_file recipes/accelerate/fsdp2.yaml -m deltamem_tool train RECIPE"
LOST_WITHIN, LOST_AGAIN = 1.0, 0.1  # seconds that are waited for a process to be gone, and between two looks
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
    if recipe.training.quantize != "none":
        raise ConfigError(
            "A quantised base cannot be sharded.",
            "transformers divides weights by their rows while it loads them, and packed weights have none.",
            "Set training.quantize to none, or training.shard to none.",
        )
    if recipe.lora is not None:
        raise ConfigError(
            "A LoRA is not trained on a sharded base.",
            "Its weights are inside of the base's layers.",
            "Leave out lora, or train it without sharding.",
        )


@contextmanager
def naming_lost_processes(launch: Launch, run: Path) -> Iterator[None]:
    """Say which process has ended where an error inside comes of that; `run` has the checkpoints."""
    mine = (launch.state.process_index, socket.gethostname(), os.getpid())
    members = gather_object([mine]) if launch.processes > 1 else [mine]
    try:
        yield
    except RuntimeError as error:  # gloo has no type of its own
        lost = _lost(members)
        if not lost and not isinstance(error, torch.distributed.DistError):
            raise
        raise DeltaMemError(
            f"Process {', '.join(lost)} of this run has ended." if lost else "Another process of this run has ended.",
            f"{first_line(error)}.",
            f"Whole checkpoints are in {run}: --resume goes on from the last.",
        ) from error


def _lost(members: Sequence[tuple[int, str, int]]) -> list[str]:
    """Those on this machine that are gone, after a moment in which one that is killed may still be there."""
    here = [(rank, pid) for rank, host, pid in members if host == socket.gethostname() and pid != os.getpid()]
    for _ in range(int(LOST_WITHIN / LOST_AGAIN) if here else 0):
        lost = [f"{rank} (pid {pid})" for rank, pid in here if not _runs(pid)]
        if lost:
            return lost
        time.sleep(LOST_AGAIN)
    return []


def _runs(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False

"""The processes started by torchrun or `accelerate launch`: how they connect, and which of them have ended."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from deltamem_tool.errors import ConfigError, DeltaMemError, InstallationError, first_line

if TYPE_CHECKING:
    import torch
    from accelerate import PartialState

MEET_WITHIN = timedelta(minutes=10)  # torch would wait for half an hour
PATIENCE = timedelta(days=30)  # the first to finish waits; launchers end all processes once one has failed
LOST_WITHIN, LOST_AGAIN = 1.0, 0.1  # seconds to wait for a process to be gone, and between two checks


def launch_world_size() -> int:
    """Return the number of processes that the launcher has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launch_rank() -> int:
    """Return the number of this process in the launch, from 0."""
    return int(os.environ.get("RANK", "0"))


def runs_on_cpus() -> bool:
    """Whether several processes run without GPUs."""
    import torch

    return launch_world_size() > 1 and not torch.accelerator.is_available()


def check_started() -> None:
    """Check that `accelerate launch` has started as many processes as it was asked for.

    When asked for several, it sets the address where they connect. On CPUs it then starts a single process, which has
    no number.

    Raises:
        ConfigError: it has started only one of several.
    """
    if {"ACCELERATE_USE_CPU", "MASTER_ADDR"} <= os.environ.keys() and "WORLD_SIZE" not in os.environ:
        raise ConfigError(
            "accelerate launch was asked for several processes, but has started only one.",
            "It does so on CPUs.",
            "Start them with torchrun --nproc-per-node N -m deltamem_tool, or give it --num_processes 1.",
        )


def join(patience: timedelta | None = None, within: timedelta = MEET_WITHIN) -> PartialState:
    """Join the processes of a launch, on GPUs if there are any, else on CPUs; or be the only one.

    Args:
        patience: how long a process waits for another in a collective operation; None is torch's default.
        within: how long all of them may take to connect.

    Raises:
        ConfigError: as `check_started`.
        DeltaMemError: some did not connect.
        InstallationError: accelerate is not installed.
    """
    import torch

    check_started()

    try:
        from accelerate import PartialState
    except ImportError as error:
        raise InstallationError(
            "Several processes need accelerate, which is not installed.",
            "It comes with the extra 'train' of deltamem-tool.",
            "pip install 'deltamem-tool[train]'",
        ) from error

    count = launch_world_size()
    try:
        # Kept until all processes have joined, because one of them serves it.
        store = None if count == 1 or torch.distributed.is_initialized() else _rendezvous(count, within)
        state = PartialState(cpu=runs_on_cpus(), **({} if patience is None else {"timeout": patience}))
        del store
    except torch.distributed.DistError as error:
        raise _rendezvous_error(
            f"The {count} processes of this run did not find each other.", first_line(error)
        ) from error
    return state


def join_launched() -> torch.device | None:
    """Join the processes of a launch, where an exchange may take as long as `PATIENCE`.

    Returns:
        The device of this process, or None if it is the only process.

    Raises:
        ConfigError, DeltaMemError, InstallationError: as `join`.
    """
    check_started()
    if launch_world_size() == 1:
        return None
    device: torch.device = join(PATIENCE).device
    return device


def _rendezvous(count: int, within: timedelta) -> Any:
    """Wait for all processes at the launch's address, and return the store; None if the launcher has set no address.

    Raises:
        DeltaMemError: some did not connect; the error names them.
    """
    import torch

    if "MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ:
        return None
    number, host, port = launch_rank(), os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # by torchrun, else by the first process
    is_master = number == 0 and not served
    keys = [f"deltamem/{each}" for each in range(count)]
    store: Any = None
    missing = [0]
    try:
        store = torch.distributed.TCPStore(  # type: ignore[attr-defined]  # torch documents this name but does not list it
            host, port, count, is_master, within, wait_for_workers=False, multi_tenant=True
        )
        store.set(keys[number], "here")
        store.wait(keys, within)
    except torch.distributed.DistError as error:
        if store is not None:
            missing = [each for each, key in enumerate(keys) if not store.check([key])]
        elif is_master or served:
            raise
        raise _rendezvous_error(
            f"Process{'es' if len(missing) > 1 else ''} {', '.join(map(str, missing))} of the {count} of this run did "
            "not connect.",
            f"This process waited at {host}:{port} for {within.total_seconds():.0f} seconds",
        ) from error
    return store


def _rendezvous_error(what: str, why: str) -> DeltaMemError:
    return DeltaMemError(
        what,
        f"{why}.",
        "Start as many processes as the launcher's configuration says, all with the same address and port.",
    )


Member = tuple[int, str, int]  # its number, host and process id


def members() -> list[Member]:
    """Return all processes of the launch that have joined. All of them must call this."""
    from accelerate import PartialState
    from accelerate.utils import gather_object

    mine = (launch_rank(), socket.gethostname(), os.getpid())
    return list(gather_object([mine])) if PartialState().num_processes > 1 else [mine]


@contextmanager
def report_lost_processes(processes: Sequence[Member], advice: str) -> Iterator[None]:
    """Turn an error inside the block that comes from a lost process into one that names it and gives `advice`."""
    from torch.distributed import DistError

    try:
        yield
    except RuntimeError as error:  # gloo has no error type of its own
        lost = _find_lost(processes)
        if not lost and not isinstance(error, DistError):
            raise
        raise DeltaMemError(
            f"Process {', '.join(lost)} of this run has ended." if lost else "Another process of this run has ended.",
            f"{first_line(error)}.",
            advice,
        ) from error


def _find_lost(processes: Sequence[Member]) -> list[str]:
    """Return the processes on this machine that have ended, after waiting a moment for one that is being killed."""
    here = [(number, pid) for number, host, pid in processes if host == socket.gethostname() and pid != os.getpid()]
    for _ in range(int(LOST_WITHIN / LOST_AGAIN) if here else 0):
        lost = [f"{number} (pid {pid})" for number, pid in here if not _is_running(pid)]
        if lost:
            return lost
        time.sleep(LOST_AGAIN)
    return []


def _is_running(pid: int) -> bool:
    import psutil

    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False

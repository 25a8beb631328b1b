"""The number of cores a process may use, and the number of threads its user asks for."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

MAX_THREADS = 1024  # per computation: far more than any machine can use
_GROUPS_OF_THIS_PROCESS = Path("/proc/self/cgroup")
_GROUPS = Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """Return how many cores this process may use. `taskset` and container quotas can reduce the number."""
    return max(1, min([_affinity(), *map(math.ceil, _quotas())]))


def default_threads() -> int:
    """Return the number of threads for a computation: `OMP_NUM_THREADS`, as in PyTorch, or else the usable cores."""
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # what follows is for nested regions
    return int(first) if first.isdecimal() and 0 < int(first) <= MAX_THREADS else usable_cores()


def respect_quota() -> None:
    """Limit PyTorch's threads to the quota. PyTorch itself respects the affinity, but not the quota.

    Call this before PyTorch is imported.
    """
    cores = usable_cores()
    if cores < _affinity():
        os.environ.setdefault("OMP_NUM_THREADS", str(cores))


def _affinity() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # not on Windows


def _quotas() -> Iterator[float]:
    """The quotas of this process's control groups and those around them, in cores (Linux; versions 1 and 2)."""
    try:
        lines = _GROUPS_OF_THIS_PROCESS.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = _GROUPS / controllers
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):  # if the group is outside this container, only the root is visible
            if folder.is_relative_to(root):
                yield from _quota(folder)


def _quota(group: Path) -> Iterator[float]:
    """Yield the quota of one group in cores, if it has one: microseconds of CPU time by microseconds."""
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            quota, period = map(int, " ".join((group / name).read_text() for name in names).split())
        except (OSError, ValueError):  # not there, or "max"
            continue
        if quota > 0 < period:
            yield quota / period

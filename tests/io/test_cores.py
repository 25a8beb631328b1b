"""The number of threads follows what a process may use: affinity, control group quotas, OMP_NUM_THREADS."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from deltamem_tool.io import cores
from deltamem_tool.io.cores import default_threads, respect_quota, usable_cores

CORES = 16


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """`machine(groups, files)`: a machine with `CORES`, the control groups of this process, and their files."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(CORES)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: CORES)

    def build(groups, files):
        (tmp_path / "groups").write_text(groups)
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        monkeypatch.setattr(cores, "_GROUPS_OF_THIS_PROCESS", tmp_path / "groups")
        monkeypatch.setattr(cores, "_GROUPS", tmp_path)

    return build


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/\n", {"cpu.max": "max 100000\n"}, CORES),
        ("0::/\n", {"cpu.max": "200000 100000\n"}, 2),  # docker run --cpus 2
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "1000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "9900000 100000\n"}, CORES),
        (
            "0::/user.slice/run-1.scope\n",
            {"user.slice/cpu.max": "300000 100000", "user.slice/run-1.scope/cpu.max": "max 100000"},
            3,
        ),
        (
            "3:cpu,cpuacct:/docker/1f\n2:pids:/\n",
            {"cpu,cpuacct/cpu.cfs_quota_us": "400000", "cpu,cpuacct/cpu.cfs_period_us": "100000"},
            4,
        ),
        ("3:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, CORES),
        ("4:cpuset:/\n", {"cpuset/cpu.max": "100000 100000"}, CORES),
        ("", {"cpu.max": "100000 100000"}, CORES),
        ("0::/\n", {"cpu.max": "nonsense\n"}, CORES),
    ],
)
def test_quotas_of_control_groups_limit_the_cores(machine, groups, files, expected):
    machine(groups, files)
    assert usable_cores() == default_threads() == expected


def test_without_control_groups_all_cores_are_used(machine, tmp_path):
    machine("", {})
    (tmp_path / "groups").unlink()
    assert usable_cores() == CORES


@pytest.mark.parametrize(
    ("value", "expected"),
    [("3", 3), ("4,2", 4), (" 64 ", 64), *((value, 2) for value in ("", "0", "-1", "many", "9" * 20))],
)
def test_omp_num_threads_takes_precedence(machine, monkeypatch, value, expected):
    machine("0::/\n", {"cpu.max": "200000 100000\n"})
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert default_threads() == expected
    respect_quota()
    assert os.environ["OMP_NUM_THREADS"] == value


def test_only_a_quota_changes_the_threads_of_pytorch(machine, monkeypatch):
    machine("0::/\n", {"cpu.max": "max 100000\n"})
    respect_quota()
    assert "OMP_NUM_THREADS" not in os.environ
    machine("0::/\n", {"cpu.max": "200000 100000\n"})
    monkeypatch.setenv("OMP_NUM_THREADS", "unset after this test")
    monkeypatch.delenv("OMP_NUM_THREADS")
    respect_quota()
    assert os.environ["OMP_NUM_THREADS"] == "2"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity")
def test_affinity_limits_the_cores():
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
    code += "from deltamem_tool.io.cores import usable_cores; print(usable_cores())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "1"

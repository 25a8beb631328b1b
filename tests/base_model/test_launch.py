"""Launches of several processes of which one never joins."""

from __future__ import annotations

import socket
import subprocess
import sys
from datetime import timedelta

import pytest
from helpers.processes import together

from base_model.launches import waits
from deltamem_tool.base_model.launch import join, join_launched
from deltamem_tool.errors import ConfigError, InstallationError

COUNT, LIMIT = 3, timedelta(seconds=4)


@pytest.mark.slow
@pytest.mark.parametrize(("late", "has_launcher"), [(2, True), (0, True), (0, False)])
def test_a_process_that_never_joins_is_reported(late, has_launcher, tmp_path):
    """Without a launcher, the others meet at the first process."""
    with socket.socket() as nobody:  # listens on this port
        nobody.bind(("127.0.0.1", 0))
        port = None if has_launcher else nobody.getsockname()[1]
        together(COUNT, waits, late, port, LIMIT, tmp_path / "said")
    for number in {*range(COUNT)} - {late}:
        what, why, _ = (tmp_path / f"said-{number}").read_text().splitlines()
        assert what == f"Process {late} of the 3 of this run did not connect."
        assert why.startswith("This process waited at 127.0.0.1:") and why.endswith(" for 4 seconds.")


def test_joining_without_accelerate_installed_raises(monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(InstallationError, match="accelerate, which is not installed"):
        join()


@pytest.mark.slow
@pytest.mark.parametrize("told", [1, 2])
def test_accelerate_starts_one_process_on_cpus_whatever_the_number(told, tmp_path):
    """If it was told to start one process, that one runs alone. If it was told to start two, the one process raises."""
    script = tmp_path / "joins.py"
    script.write_text("from deltamem_tool.base_model.launch import join\nprint('alone:', join().num_processes == 1)\n")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", str(told), str(script)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    is_refused = "asked for several processes, but has started only one" in result.stderr
    assert ("alone: True" in result.stdout, is_refused) == (told == 1, told == 2), result.stderr


def test_join_launched_raises_when_processes_are_missing(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert join_launched() is None
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(ConfigError, match=r"has started only one\.[\s\S]*torchrun"):
        join_launched()

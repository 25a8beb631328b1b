"""Processes that are to meet, of which one does not come."""

from __future__ import annotations

import socket
import sys
from datetime import timedelta

import pytest
from helpers.processes import together

from base_model.launches import waits
from deltamem_tool.base_model.launch import join
from deltamem_tool.errors import InstallationError

COUNT, LIMIT = 3, timedelta(seconds=4)


@pytest.mark.slow
@pytest.mark.parametrize(("late", "has_launcher"), [(2, True), (0, True), (0, False)])
def test_a_process_never_comes(late, has_launcher, tmp_path):
    """Without a launcher the first process is where the others are to meet."""
    with socket.socket() as nobody:  # who listens at this port
        nobody.bind(("127.0.0.1", 0))
        port = None if has_launcher else nobody.getsockname()[1]
        together(COUNT, waits, late, port, LIMIT, tmp_path / "said")
    for number in {*range(COUNT)} - {late}:
        what, why, _ = (tmp_path / f"said-{number}").read_text().splitlines()
        assert what == f"Process {late} of the 3 of this run did not come."
        assert why.startswith("It was waited for at 127.0.0.1:") and why.endswith(" for 4 seconds.")


def test_what_they_meet_by_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(InstallationError, match="accelerate, which is not installed"):
        join()

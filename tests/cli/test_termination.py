"""However a command is terminated, it leaves no partial output."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest
from helpers.tiny import listing

# A command that has begun to write a folder, and prints so.
WRITING = """
import os, signal, time, click
from deltamem_tool.cli import main
from deltamem_tool.io.atomic import atomic_folder

@click.command()
def command():
    with atomic_folder("folder") as staged:
        (staged / "half").write_text("written")
        print("writing", signal.getsignal(signal.SIGHUP) is signal.SIG_IGN, flush=True)
        time.sleep(60)

main(command)
"""
FORKING = """
import multiprocessing, os, click
from deltamem_tool.cli import main

@click.command()
def command():
    with multiprocessing.get_context("fork").Pool(1) as pool:
        print(pool.apply(os.getppid) == os.getpid())

main(command)
"""


def heed_signals() -> None:
    """Restore the handlers: background processes of a shell ignore SIGINT, and nohup ignores SIGHUP."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 1), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_leaves_no_partial_output(tmp_path, number, code):
    with subprocess.Popen(
        [sys.executable, "-c", WRITING],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_signals,
    ) as process:
        assert process.stdout.readline() == "writing False\n" and len(listing(tmp_path)) == 2
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (code, "\nAborted!\n") and listing(tmp_path) == {}


def test_ignored_signals_stay_ignored(tmp_path):
    """nohup starts commands with SIGHUP ignored."""
    with subprocess.Popen(
        [sys.executable, "-c", WRITING],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    ) as process:
        assert process.stdout.readline() == "writing True\n"
        process.kill()


def test_pool_workers_end_silently(tmp_path):
    result = subprocess.run([sys.executable, "-c", FORKING], cwd=tmp_path, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "True\n", "")

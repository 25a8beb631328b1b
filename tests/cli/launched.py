"""A command in the processes of a launch: a function that a forked process can import."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from click.testing import CliRunner

from deltamem_tool.base_model.launch import launch_rank
from deltamem_tool.cli import cli
from deltamem_tool.cli.termination import interrupt_on_signals


def invoked(arguments: list[str], lines: str, output: Path) -> None:
    """Run `deltamem` with `lines` as its input. Each process writes its stdout to a file."""
    torch.set_num_threads(1)
    with interrupt_on_signals():
        result = CliRunner().invoke(cli, arguments, input=lines, prog_name="deltamem")
    output.with_name(f"{output.name}-{launch_rank()}").write_text(result.stdout)
    sys.exit(result.exit_code)

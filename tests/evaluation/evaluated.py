"""An evaluation run by the processes of a launch; a forked process can import it."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from deltamem_tool.cli import cli
from deltamem_tool.errors import DeltaMemError


def loses_another(folder: Path, arguments: list[str], errors: Path) -> None:
    """Run `deltamem` in `folder`, and write what ends it to `errors`."""
    torch.set_num_threads(1)
    os.chdir(folder)
    try:
        cli(arguments, standalone_mode=False)
    except DeltaMemError as error:
        errors.write_text(str(error))

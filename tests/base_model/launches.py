"""The function that the processes of a launch run, in a module that a forked process can import."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

from deltamem_tool.base_model.launch import join, launch_rank
from deltamem_tool.errors import DeltaMemError


def waits(late: int, port: int | None, within: timedelta, report: Path) -> None:
    """Join the launch, except in the process that never does, and write the error that follows.

    Args:
        late: the rank of the process that never joins.
        port: the port of the first process without a launcher; None under torchrun.
        within: how long the others wait for it.
        report: the file for the error; each process adds its rank to the name.
    """
    if launch_rank() == late:
        return
    if port is not None:
        os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "False", "MASTER_PORT": str(port)}
    try:
        join(within=within)
    except DeltaMemError as error:
        report.with_name(f"{report.name}-{launch_rank()}").write_text(str(error))

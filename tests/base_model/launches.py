"""The function that the processes of a launch run, in a module that a forked process can import."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

from deltamem_tool.base_model.launch import join, launch_rank
from deltamem_tool.errors import DeltaMemError


def waits(late: int, port: int | None, within: timedelta, report: Path) -> None:
    """Join, but for the process that never does; write what became of that.

    Args:
        late: that process.
        port: where the first one is to be found, as without torchrun; None is where torchrun is.
        within: how long is waited for it.
        said: the name of the files; each process adds its number.
    """
    if launch_rank() == late:
        return
    if port is not None:
        os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "False", "MASTER_PORT": str(port)}
    try:
        join(within=within)
    except DeltaMemError as error:
        report.with_name(f"{report.name}-{launch_rank()}").write_text(str(error))

"""Output that commands share: progress on stderr, and quiet libraries."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


def _console(stderr: bool = False) -> Console:
    """Return the console of stdout or stderr.

    rich follows `NO_COLOR`, `FORCE_COLOR` and `TERM`, but leaves bold and dim under the first, which are escape codes
    as well, and under the second moves the cursor in what goes to a file.
    """
    colours: Any = None if os.environ.get("NO_COLOR") else Console(stderr=stderr).color_system
    is_file = not (sys.stderr if stderr else sys.stdout).isatty()
    return Console(stderr=stderr, color_system=colours, force_terminal=False if is_file else None)


STDOUT, STDERR = _console(), _console(stderr=True)
SPINNER = "line" if STDERR.options.ascii_only else "dots"


@contextmanager
def progress() -> Iterator[Progress]:
    """Show progress on stderr, and turn off the libraries' own bars and warnings."""
    quiet_libraries()
    columns = (
        SpinnerColumn(SPINNER),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=STDERR) as bar:
        yield bar


def in_words(seconds: float) -> str:
    """Return a duration in words, such as `about 4 minutes`."""
    for unit, size in (("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 1.5 * size:
            return f"about {seconds / size:.{int(seconds < 10 * size and size == 3600)}f} {unit}"
    return f"about {max(2.0, seconds):.0f} seconds"


def quiet_libraries() -> None:
    """Turn off warnings and progress bars of libraries; transformers' switch is also the Hub's."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers annotates neither
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)

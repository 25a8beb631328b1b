"""Output shared by the commands: progress on stderr, and silencing of libraries."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn


def _console(stderr: bool = False) -> Console:
    """Return the console of stdout or stderr.

    rich follows `NO_COLOR`, `FORCE_COLOR`, `TERM` and `COLUMNS`, but leaves bold and dim under the first, which are
    escape codes as well; under the second it moves the cursor in what goes to a file; and with a width of 0, it prints
    nothing.
    """
    colours: Any = None if os.environ.get("NO_COLOR") else Console(stderr=stderr).color_system
    is_file = not (sys.stderr if stderr else sys.stdout).isatty()
    width = shutil.get_terminal_size().columns if os.environ.get("COLUMNS") == "0" else None
    return Console(stderr=stderr, color_system=colours, force_terminal=False if is_file else None, width=width)


STDOUT, STDERR = _console(), _console(stderr=True)
SPINNER = "line" if STDERR.options.ascii_only else "dots"


@contextmanager
def progress(transient: bool = False, hidden: bool = False) -> Iterator[Progress]:
    """Show progress on stderr, `transient` or for good or not at all; turn off the libraries' own bars and warnings."""
    quiet_libraries()
    columns = (
        SpinnerColumn(SPINNER),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        TimeElapsedColumn(),
    )
    disabled = hidden or (transient and not STDERR.is_terminal)
    with Progress(*columns, console=STDERR, transient=transient, disable=disabled) as bar:
        yield bar


@contextmanager
def stages() -> Iterator[Callable[[str, int, int], None]]:
    """Show stages on stderr as they go on, a line each, while they last; nothing where it is not a terminal.

    Yields what is called with a stage, how much of it is done, and how much there is; 0 where that is not counted.
    """
    with progress(transient=True) as bar:
        tasks: dict[str, TaskID] = {}

        def report(stage: str, done: int, of: int) -> None:
            if stage not in tasks:
                for task in bar.tasks:  # the stages before
                    bar.update(task.id, total=task.total or 1, completed=task.total or 1)
                tasks[stage] = bar.add_task(stage, total=None, note="")
            bar.update(tasks[stage], completed=done, total=of or None)

        yield report


def duration_text(seconds: float) -> str:
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

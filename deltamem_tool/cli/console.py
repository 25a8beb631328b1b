"""What the commands share on screen: progress on stderr, tables on stdout."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

STDERR = Console(stderr=True)


@contextmanager
def progress() -> Iterator[Progress]:
    """A progress display on stderr; libraries' own bars and warnings are quiet meanwhile."""
    quiet_libraries()
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=STDERR) as bar:
        yield bar


def in_words(seconds: float) -> str:
    """`about 4 minutes`"""
    for unit, size in (("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 1.5 * size:
            return f"about {seconds / size:.{int(seconds < 10 * size and size == 3600)}f} {unit}"
    return f"about {max(2.0, seconds):.0f} seconds"


def quiet_libraries() -> None:
    """No warnings of libraries' own, and no bars: transformers' switch is also the Hub's."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)

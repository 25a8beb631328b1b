"""Output that commands share: progress on stderr, and quiet libraries."""

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
    """Show progress on stderr, and turn off the libraries' own bars and warnings."""
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

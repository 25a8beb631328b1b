"""Open the standard streams if the process was started without them."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def open_missing() -> None:
    """Open the null device for stdin, stdout and stderr where they are closed (`>&-`).

    Or the file that is opened next would get the stream's number, and what libraries print would go there.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115  (until the program ends)

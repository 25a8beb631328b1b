"""Image files: the extension of the name sets the format."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from deltamem_tool.errors import ConfigError
from deltamem_tool.io.atomic import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = ("png", "svg", "pdf", "jpg", "jpeg", "webp", "tif", "tiff", "eps", "ps")


def picture_format(path: str | Path) -> str:
    """Return the format that the suffix of a picture's name sets, by default PNG. Call this before long work begins.

    Raises:
        ConfigError: the suffix is not one of `FORMATS`.
    """
    suffix = Path(path).suffix.lower().removeprefix(".")
    if suffix and suffix not in FORMATS:
        raise ConfigError(
            f"{path} is not a supported picture.",
            f"The format .{suffix} is not supported.",
            f"Choose a name that ends in one of .{', .'.join(FORMATS)}.",
        )
    return suffix or "png"


def write_picture(figure: Figure, path: str | Path, dpi: int) -> None:
    """Draw `figure` into the file `path`, whole or not at all, in the format that its suffix sets.

    Args:
        figure: of matplotlib.
        path: the file.
        dpi: dots per inch, where the format has dots.

    Raises:
        ConfigError: the suffix is not one of `FORMATS`.
    """
    picture, kind = io.BytesIO(), picture_format(path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a file's name may be in letters that the font does not have
        figure.savefig(picture, format=kind, dpi=dpi)
    write_atomically(path, picture.getvalue())


def printable(text: str) -> str:
    """Replace characters of `text` that cannot be drawn, such as half a surrogate pair in a file name, by `?`."""
    return "".join(each if each.isprintable() or each == "\n" else "?" for each in text)

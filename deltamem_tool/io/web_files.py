"""Find the JavaScript files that the pages of `deltamem serve` and `deltamem page` ship."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).parents[1]
PARTS = _PACKAGE / "assets" / "page"  # what both pages show with


def library() -> Path:
    """The library of `web/`: inside the package where it is installed, beside it in a working copy."""
    installed = _PACKAGE / "web"
    return installed if installed.is_dir() else _PACKAGE.parent / "web" / "src"

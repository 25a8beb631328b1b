"""Find the JavaScript files that the pages of `deltamem serve` and `deltamem page` ship."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).parents[1]
PARTS = _PACKAGE / "assets" / "page"  # files that both pages use


def library() -> Path:
    """The folder of the library in `web/`: inside an installed package, or beside the package in a working copy."""
    installed = _PACKAGE / "web"
    return installed if installed.is_dir() else _PACKAGE.parent / "web" / "src"

"""docs/cli.md, docs/recipe.md and docs/api.md are up to date with the code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import deltamem_tool

SCRIPT = Path(__file__).parents[2] / "scripts" / "reference.py"


@pytest.mark.slow
def test_the_pages_are_up_to_date():
    """Runs in its own process, because click caches a command's `--help`."""
    result = subprocess.run([sys.executable, SCRIPT, "--check"], capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr


def test_every_public_name_has_a_summary_line():
    for name in deltamem_tool.__all__:
        if name != "__version__":
            first, _, rest = (getattr(deltamem_tool, name).__doc__ or "").strip().partition("\n")
            assert first.endswith(".") and (not rest or not rest.splitlines()[0].strip()), name

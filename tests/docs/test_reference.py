"""docs/cli.md and docs/api.md are what the code says."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "reference.py"


@pytest.fixture(scope="module")
def reference():
    spec = importlib.util.spec_from_file_location("reference", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["cli.md", "api.md"])
def test_a_page_is_what_the_code_says(reference, name):
    path = reference.DOCS / name
    assert path.read_text(encoding="utf-8") == reference.PAGES[path](), "stale: make docs"


def test_every_public_name_has_a_summary_line(reference):
    import deltamem_tool

    for name in deltamem_tool.__all__:
        if name != "__version__":
            first, _, rest = (getattr(deltamem_tool, name).__doc__ or "").strip().partition("\n")
            assert first.endswith(".") and (not rest or not rest.splitlines()[0].strip()), name

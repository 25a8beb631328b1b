"""An adapter of the reference implementation that may be changed, and base models of ours."""

from __future__ import annotations

import pytest
from adapter.reference.adapters import CASE, writable
from helpers.tiny import save_checkpoint


@pytest.fixture
def reference(tmp_path):
    """A copy of a reference adapter that may be changed; `BASE` is its base."""
    return writable(CASE / "adapter", tmp_path / "reference")


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """Models of ours on disk, by architecture; read only."""
    folder = tmp_path_factory.mktemp("bases")
    return {name: save_checkpoint(folder / name, name=name) for name in ("qwen3", "smollm3")}

"""The recipe of a short training run."""

from __future__ import annotations

import pytest
from training.short_runs import short_run


@pytest.fixture
def recipe(checkpoint, tmp_path):
    return short_run(checkpoint, tmp_path)

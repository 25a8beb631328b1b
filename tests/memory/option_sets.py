"""Options of memories that tests of several files try in turn."""

from __future__ import annotations

import pytest

OPTIONS = {
    "token": {},
    "message": {"granularity": "message"},
    "extras": {"couple_lambda": False, "delta_scale": "branch", "o_norm": True, "state_heads": 2},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)

"""Models that see padding of an earlier call as if it were tokens."""

from __future__ import annotations

import pytest
from base_model.test_export_sweep import patched

from deltamem_tool.memory.call_options import CallOptions


@pytest.mark.parametrize(("model_type", "loses"), [("git", True), ("gpt_neo", False), ("mpt", False)])
def test_loses_padding_finds_models_that_see_earlier_padding(model_type: str, loses: bool):
    model = patched(model_type, 1)
    assert CallOptions(model, "last").loses_padding(model) == loses

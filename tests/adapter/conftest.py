"""An adapter's folder that may be changed, and the base model it is for."""

from __future__ import annotations

import pytest
from helpers.tiny import randomise, save_checkpoint
from transformers import AutoModelForCausalLM

from deltamem_tool import DeltaMemConfig, attach, save_adapter


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """Read only."""
    return save_checkpoint(tmp_path_factory.mktemp("base") / "model", name="qwen3")


@pytest.fixture
def adapter(base, tmp_path):
    """The folder of an adapter with random weights, on `base`."""
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    randomise(attach(model, DeltaMemConfig(rank=4)))
    save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter"

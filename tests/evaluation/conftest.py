from __future__ import annotations

import pytest
from helpers.tiny import randomise, tiny_model

from deltamem_tool import DeltaMemConfig, attach


@pytest.fixture(scope="module")
def model(tokenizer):
    model = tiny_model(vocab_size=len(tokenizer))
    randomise(attach(model, DeltaMemConfig(rank=4)))
    return model

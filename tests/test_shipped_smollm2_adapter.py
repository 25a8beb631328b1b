"""The shipped adapter for SmolLM2-135M-Instruct: its size, its base, and recall of held-out facts."""

from __future__ import annotations

import pytest

from deltamem_tool.adapter.folder import read_adapter
from deltamem_tool.adapter.load import load
from deltamem_tool.base_model.smollm2 import BUILTIN_NAME
from deltamem_tool.base_model.tokenizer import tokenizer_of
from deltamem_tool.evaluation.conditions import EvalProtocol
from deltamem_tool.evaluation.runner import evaluate
from deltamem_tool.evaluation.tasks.natural_recall import recall

ADAPTER = "builtin:smollm2-adapter"
MAX_BYTES = 5_000_000  # of its files in a clone and in the wheel
CONVERSATIONS = 16
MIN_RECALL, MAX_CONTROL = 0.75, 0.1  # with one fact; each answer counts 0.06


def test_the_adapter_is_small_and_names_its_base():
    folder = read_adapter(ADAPTER)
    assert folder.base.name == BUILTIN_NAME
    assert sum(file.stat().st_size for file in folder.path.iterdir()) < MAX_BYTES


@pytest.mark.slow
@pytest.mark.real_model
@pytest.mark.usefixtures("smollm2_gguf")
def test_the_adapter_recalls_held_out_facts():
    model = load(ADAPTER)
    task = recall("natural", facts=(1,), episodes=CONVERSATIONS, form="plain")
    result = evaluate(model, tokenizer_of(model), task, EvalProtocol.parse("memory"), only=("state", "donor_state"))
    assert result.estimate("contains", "state", "1 fact").mean >= MIN_RECALL
    assert result.estimate("contains", "donor_state", "1 fact").mean <= MAX_CONTROL

"""The shipped backbone: small, plain transformers, and able to answer from its context."""

from __future__ import annotations

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from deltamem_tool.data import dialogues
from deltamem_tool.io.names import ASSETS

MAX_BYTES = 8_000_000
MIN_RECALL = 0.95  # exact match with 4 held-out facts in view


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ASSETS / "backbone")


def test_the_backbone_with_tokenizer_and_template_is_small():
    assert sum(file.stat().st_size for file in (ASSETS / "backbone").rglob("*")) <= MAX_BYTES


def test_every_value_is_one_token(tokenizer):
    for kind in dialogues.KINDS:
        for value in kind.values:
            assert len(tokenizer(f" {value}").input_ids) == 1, value


def test_any_text_can_be_encoded(tokenizer):
    text = "Zürich 东京 🦜 snake_case\n\ttabs"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_the_backbone_answers_from_its_context(tokenizer):
    """Measured by the ceiling condition of `recall`: plain `generate` without an adapter, on held-out pairs."""
    from deltamem_tool import attach
    from deltamem_tool.evaluation.conditions import EvalProtocol
    from deltamem_tool.evaluation.runner import evaluate
    from deltamem_tool.evaluation.tasks.recall import Recall

    model = AutoModelForCausalLM.from_pretrained(ASSETS / "backbone").eval()
    assert model.config.model_type == "qwen3"
    attach(model)  # removed again by the conditions
    only = ("full_context", "no_adapter")
    evaluation = evaluate(model, tokenizer, Recall((4,), 200, seed=7), EvalProtocol.parse("memory"), only=only)
    assert evaluation.estimate("exact", "full_context").mean >= MIN_RECALL
    assert evaluation.estimate("exact", "no_adapter").mean <= 0.05


def test_training_and_evaluation_share_no_pair():
    for training, held_out in dialogues.SPLITS.values():
        assert not set(training) & set(held_out)
        assert len(held_out) * dialogues.HELD_OUT_SHARE == len(training) + len(held_out)

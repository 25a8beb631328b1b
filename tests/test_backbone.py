"""The backbone that ships: small, plain transformers, and it answers from its context."""

from __future__ import annotations

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from deltamem_tool import dialogues
from deltamem_tool.resolve import ASSETS

MAX_BYTES = 8_000_000
MIN_RECALL = 0.95  # exact match with 4 held-out facts in view


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ASSETS / "backbone")


def test_size_with_tokenizer_and_template():
    assert sum(file.stat().st_size for file in (ASSETS / "backbone").rglob("*")) <= MAX_BYTES


def test_every_value_is_one_token(tokenizer):
    for kind in dialogues.KINDS:
        for value in kind.values:
            assert len(tokenizer(f" {value}").input_ids) == 1, value


def test_any_text_encodes(tokenizer):
    text = "Zürich 东京 🦜 snake_case\n\ttabs"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_answers_from_its_context(tokenizer):
    """Through `recall`'s own ceiling condition: plain generate, no adapter, conversations of held-out pairs."""
    from deltamem_tool import attach
    from deltamem_tool.evaluation.recall import evaluate_recall

    model = AutoModelForCausalLM.from_pretrained(ASSETS / "backbone").eval()
    assert model.config.model_type == "qwen3"
    attach(model)  # taken off again by the condition
    result = evaluate_recall(
        model, tokenizer, facts=(4,), episodes=200, seed=7, conditions=("full_context", "no_memory")
    )
    assert result.scores["full_context"][0].mean >= MIN_RECALL
    assert result.scores["no_memory"][0].mean <= 0.05


def test_training_and_evaluation_share_no_pair():
    for training, held_out in dialogues.SPLITS.values():
        assert not set(training) & set(held_out)
        assert len(held_out) * dialogues.HELD_OUT_SHARE == len(training) + len(held_out)

"""The effect of each option of a training run."""

from __future__ import annotations

import dataclasses
import json

import peft
import pytest
import torch
from helpers.tiny import listing, save_checkpoint, weights_of
from safetensors.torch import load_file
from training.short_runs import changed, summary

from deltamem_tool import DeltaMemConfig, DeltaMemError
from deltamem_tool.adapter.config_file import SUMMARY_FILE, WEIGHTS_FILE
from deltamem_tool.adapter.folder import read_adapter
from deltamem_tool.errors import ConfigError
from deltamem_tool.recipe.load import LoraOptions, ObjectiveOptions
from deltamem_tool.training import train
from deltamem_tool.training.trainer import steps_of


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "sgd", "learning_rate": 1.0},
        {"optimizer": "adafactor"},
        {"scheduler": "cosine_with_min_lr", "scheduler_options": {"min_lr_rate": 0.1}},
        {"gradient_checkpointing": True},
        {"write_chunk": 16, "bptt": 1},
        {"gradient_accumulation": 2},
        {"dtype": "bfloat16"},
        {"attention": "eager"},
    ],
    ids=lambda options: next(iter(options)) + "-" + str(next(iter(options.values()))),
)
def test_options_of_a_run(options, recipe):
    losses = [loss for _, loss in train(changed(recipe, **{"steps": 16, "eval_every": None, **options})).losses]
    assert losses[-1] < 0.95 * losses[0]


@pytest.mark.slow
def test_recomputing_does_not_change_a_run(recipe):
    train(recipe)
    expected = load_file(f"{recipe.out}/{WEIGHTS_FILE}")
    train(changed(recipe, gradient_checkpointing=True), overwrite=True)
    weights = load_file(f"{recipe.out}/{WEIGHTS_FILE}")
    for name, weight in expected.items():
        torch.testing.assert_close(weights[name], weight, atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_quantised_base_is_trained(kind, recipe, tokenizer, tmp_path):
    # Of whole blocks of 64: bitsandbytes 0.50 computes no others on a processor with AVX512-BF16.
    base = save_checkpoint(tmp_path / "wide", tokenizer, hidden_size=64, intermediate_size=128)
    memory = DeltaMemConfig(rank=4, delta_init="base_slice")
    quantised = dataclasses.replace(recipe, base=str(base), memory=memory)
    losses = [loss for _, loss in train(changed(quantised, quantize=kind, steps=16, eval_every=None)).losses]
    assert losses[-1] < 0.95 * losses[0]
    assert {tensor.dtype for tensor in weights_of(read_adapter(recipe.out)).values()} == {torch.float32}


@pytest.mark.slow
def test_epochs_are_converted_to_steps(recipe):
    """24 conversations in batches of 4 by 2: 3 steps an epoch."""
    result = train(changed(recipe, steps=None, epochs=2.0, gradient_accumulation=2, eval_every=None))
    assert result.steps == steps_of(2.0, 24, 8) == 6
    assert train(changed(recipe, steps=None, eval_every=None), overwrite=True).steps == 6  # one, in batches of 4
    assert steps_of(0.5, 9, 4) == 2


def test_bad_rows_can_be_skipped(recipe, tmp_path):
    rows = (tmp_path / "talks.jsonl").read_text().splitlines()
    (tmp_path / "talks.jsonl").write_text("\n".join([*rows[:3], "{}", *rows[3:], "no json"]) + "\n")
    before = listing(tmp_path)
    with pytest.raises(DeltaMemError, match=r"talks.jsonl:4"):
        train(recipe)
    assert listing(tmp_path) == before
    data = dataclasses.replace(recipe.data, skip_bad_rows=True)
    result = train(changed(dataclasses.replace(recipe, data=data), eval_every=None))
    assert result.skipped_rows == 2 and summary(recipe)["skipped_rows"] == 2


@pytest.mark.slow
def test_a_lora_learns_from_the_same_episodes(recipe, tmp_path):
    lora = dataclasses.replace(recipe, memory=DeltaMemConfig(), lora=LoraOptions(rank=4, dropout=0.1))
    result = train(changed(lora, steps=16, eval_every=8))
    losses = [loss for _, loss in result.losses]
    assert losses[-1] < 0.95 * losses[0]
    summary = json.loads((tmp_path / "adapter" / SUMMARY_FILE).read_text())
    assert any("eval_recall" in row and "eval_recall_zero" not in row for row in summary["log"])
    config = peft.PeftConfig.from_pretrained(tmp_path / "adapter")
    assert (config.r, set(config.target_modules)) == (4, {"q_proj", "o_proj"})
    assert config.base_model_name_or_path == recipe.base
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert sum(weight.numel() for weight in weights.values()) == result.parameters
    assert any(weight.abs().max() > 0 for name, weight in weights.items() if "lora_B" in name)


def test_a_lora_without_matching_modules_raises(recipe):
    lora = dataclasses.replace(recipe, memory=DeltaMemConfig(), lora=LoraOptions(targets=("nowhere",)))
    with pytest.raises(ConfigError, match=r"(?s)does not fit.*nowhere.*lora.targets"):
        train(lora)


@pytest.mark.slow
def test_context_dropout_hides_recent_turns(recipe):
    """With the recent turn in view, the answer is predicted from it, which gives another loss than the memory alone."""
    losses = {}
    for dropout in (0.0, 1.0):
        data = dataclasses.replace(recipe.data, recent_turns=1)
        objective = ObjectiveOptions(context_dropout=dropout)
        run = dataclasses.replace(recipe, data=data, objective=objective)
        losses[dropout] = train(changed(run, steps=1, eval_every=None), overwrite=True).losses[0][1]
    plain = train(changed(recipe, steps=1, eval_every=None), overwrite=True).losses[0][1]
    assert losses[1.0] == plain and abs(losses[0.0] - plain) > 1e-3

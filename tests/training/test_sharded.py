"""Training on processes that shard the base model (FSDP2) matches training in one process."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import pytest
import torch
from helpers.processes import started, together
from helpers.tiny import save_checkpoint
from safetensors.torch import load_file
from training.sharded_runs import loses_another, trained, trained_apart
from training.talks import write_talks
from transformers import AutoModelForCausalLM

from deltamem_tool import DeltaMemConfig
from deltamem_tool.adapter.config_file import SUMMARY_FILE, WEIGHTS_FILE
from deltamem_tool.errors import DeltaMemError
from deltamem_tool.recipe.load import DataOptions, ObjectiveOptions, Recipe, TrainingOptions
from deltamem_tool.training import dry_run, train
from deltamem_tool.training.run_folder import checkpoints, run_folder

pytestmark = pytest.mark.slow

SAME_TOLERANCE = 1e-5  # float32; weights move by about 0.03
STEPS = 20
PROCESSES = 2
LIMIT = 60  # seconds in which a process has to notice that another one has died


def with_training(recipe: Recipe, **training) -> Recipe:
    return dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, **training))


def shared(recipe: Recipe, out: Path) -> Recipe:
    """The same run on two processes that shard the base."""
    batch = recipe.training.batch_size // PROCESSES
    return dataclasses.replace(with_training(recipe, batch_size=batch, shard="fsdp2"), out=str(out))


@pytest.fixture(scope="module")
def bases(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("bases")
    tied = {"num_hidden_layers": 4, "tie_word_embeddings": True}
    return {
        "llama": save_checkpoint(folder / "llama", tokenizer, name="llama", num_hidden_layers=4),
        "tied": save_checkpoint(folder / "tied", tokenizer, name="qwen3", **tied),
        # In nf4: two blocks of 64 weights are in every row, and a block of its own in every part.
        "wide": save_checkpoint(folder / "wide", tokenizer, name="llama", hidden_size=128, intermediate_size=256),
    }


@pytest.fixture(scope="module")
def recipes(bases, tmp_path_factory):
    """One recipe for each kind of run, for one process."""
    folder = tmp_path_factory.mktemp("one")
    talks = str(write_talks(folder / "talks.jsonl"))
    whole = Recipe(
        base=str(bases["llama"]),
        out=str(folder / "whole"),
        memory=DeltaMemConfig(rank=4, state_heads=2, delta_init="base_slice"),
        data=DataOptions(path=talks, eval_path=talks, max_write_tokens=200, max_read_tokens=60),
        objective=ObjectiveOptions(write_sparsity=0.5, write_target=0.1, full_context_kl=0.2),
        training=TrainingOptions(steps=STEPS, batch_size=4, learning_rate=3e-3, eval_every=10, eval_episodes=6),
    )
    chunks = dataclasses.replace(
        with_training(whole, steps=4, write_chunk=16, bptt=2, gradient_checkpointing=True, gradient_accumulation=2),
        base=str(bases["tied"]),
        out=str(folder / "chunks"),
        memory=DeltaMemConfig(rank=4, granularity="message"),
        objective=ObjectiveOptions(history_kl=0.3),
    )
    fixed = {"static": True, "objective": ObjectiveOptions(), "out": str(folder / "static")}
    static = dataclasses.replace(with_training(whole, steps=2, eval_every=None), **fixed)
    return [whole, chunks, static]


def test_two_processes_with_a_sharded_base_match_one(recipes, tmp_path):
    """One of the runs starts Δ from the base's weights, is evaluated with three batches on two processes, and compares
    with the base; the other writes in chunks, of which the processes' conversations take unlike numbers, and recomputes
    layers of a base with tied embeddings."""
    notes = tmp_path / "notes"
    pairs = [(recipe, shared(recipe, tmp_path / Path(recipe.out).name)) for recipe in recipes]
    together(PROCESSES, trained, [two for _, two in pairs], notes)
    for (one, two), line in zip(pairs, notes.read_text().splitlines(), strict=True):
        note = json.loads(line)
        result = train(one)
        for (step, expected), (_, actual) in zip(result.losses, note["losses"], strict=True):
            assert abs(expected - actual) < SAME_TOLERANCE, f"the loss of step {step} is {actual}, not {expected}"
        weights = load_file(Path(one.out) / WEIGHTS_FILE)
        actual = load_file(Path(two.out) / WEIGHTS_FILE)
        for name, weight in weights.items():
            torch.testing.assert_close(actual[name], weight, atol=SAME_TOLERANCE, rtol=0)
        logs = [json.loads((Path(recipe.out) / SUMMARY_FILE).read_text())["log"] for recipe in (one, two)]
        evaluated = [[row for row in log if "eval_loss" in row] for log in logs]
        for before, after in zip(*evaluated, strict=True):  # donors are of the same batch, which is another
            for key in ("eval_loss", "eval_loss_zero"):
                assert abs(before[key] - after[key]) < 10 * SAME_TOLERANCE, key
        share, planned = note["share"], dry_run(two, processes=PROCESSES)
        assert (planned.base_bytes, planned.peak.weights) == (share["total"], share["held"])
        assert share["total"] / PROCESSES <= share["held"] < share["total"] / PROCESSES + largest_layer(one.base)
        assert 0 < note["whole"] <= planned.peak.gathered


def test_a_base_in_nf4_is_sharded(recipes, bases, tmp_path):
    """Each process has its part of the packed weights, and all of their scales."""
    more = {"quantize": "nf4", "gradient_checkpointing": True, "eval_every": None}
    base, notes = str(bases["wide"]), tmp_path / "notes"
    one = dataclasses.replace(with_training(recipes[0], **more), base=base, out=str(tmp_path / "one"))
    two = shared(one, tmp_path / "two")
    together(PROCESSES, trained, [two], notes)
    note, result = json.loads(notes.read_text()), train(one)
    for (step, expected), (_, actual) in zip(result.losses, note["losses"], strict=True):
        assert abs(expected - actual) < SAME_TOLERANCE, f"the loss of step {step} is {actual}, not {expected}"
    weights, actual = (load_file(Path(recipe.out) / WEIGHTS_FILE) for recipe in (one, two))
    for name, weight in weights.items():
        torch.testing.assert_close(actual[name], weight, atol=SAME_TOLERANCE, rtol=0)
    share, planned = note["share"], dry_run(two, processes=PROCESSES)
    assert (planned.base_bytes, planned.peak.weights) == (share["total"], share["held"])
    assert share["held"] < share["total"] / PROCESSES + largest_layer(base)
    assert 0 < note["whole"] <= planned.peak.gathered


def test_two_data_parallel_processes_log_the_losses_of_one(recipes, tmp_path):
    """Data parallel: episodes of many lengths, of which each process has other ones."""
    few = with_training(recipes[0], steps=3, eval_every=None)
    one, two = (dataclasses.replace(few, out=str(tmp_path / name)) for name in ("one", "two"))
    notes = tmp_path / "notes"
    together(PROCESSES, trained_apart, with_training(two, batch_size=few.training.batch_size // PROCESSES), notes)
    losses, expected = json.loads(notes.read_text()), train(one).losses
    assert len(expected) == 3
    for (step, loss), (_, other) in zip(expected, losses, strict=True):
        assert abs(loss - other) < SAME_TOLERANCE, f"the loss of step {step} is {other}, not {loss}"


def test_the_failure_of_a_process_is_reported_and_the_run_can_be_resumed(recipes, tmp_path):
    """The other one says which, soon; the last checkpoint is whole, and one process goes on from it to the same end."""
    whole = dataclasses.replace(with_training(recipes[0], eval_every=None, save_every=2), objective=ObjectiveOptions())
    one = dataclasses.replace(whole, out=str(tmp_path / "one"))
    two = shared(whole, tmp_path / "two")
    run, errors = run_folder(two.out), tmp_path / "errors"
    with started(PROCESSES, loses_another, two, errors) as processes:
        while not checkpoints(run):
            assert all(process.is_alive() for process in processes)
            time.sleep(0.05)
        processes[1].kill()
        processes[0].join(LIMIT)
    assert processes[0].exitcode == 0
    assert errors.read_text().startswith(f"Process 1 (pid {processes[1].pid}) of this run has ended.")
    assert len(checkpoints(run)) == len(list(run.glob("checkpoint-*")))
    alone = with_training(two, shard="none", gradient_accumulation=PROCESSES)
    with pytest.raises(DeltaMemError, match="processes was 2, is 1") as raised:
        train(with_training(alone, gradient_accumulation=1), resume=True)
    assert "that make 4 episodes per step" in raised.value.next
    train(alone, resume=True)
    train(one)
    weights, actual = (load_file(Path(recipe.out) / WEIGHTS_FILE) for recipe in (one, alone))
    for name, weight in weights.items():
        torch.testing.assert_close(actual[name], weight, atol=SAME_TOLERANCE, rtol=0)


def largest_layer(base: str) -> int:
    """Bytes of a decoder layer."""
    layers = AutoModelForCausalLM.from_pretrained(base).base_model.layers
    return max(sum(weight.nbytes for weight in layer.parameters()) for layer in layers)

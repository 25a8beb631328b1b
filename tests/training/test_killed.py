"""A run killed while it writes a checkpoint and then resumed ends bit-identical to an uninterrupted one."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
import yaml
from helpers.forked_process import forked_process
from safetensors.torch import load_file
from training.halted import train_until
from training.talks import write_talks

from deltamem_tool.adapter.config_file import WEIGHTS_FILE
from deltamem_tool.recipe.load import load_recipe
from deltamem_tool.training import train
from deltamem_tool.training.run_folder import checkpoints

pytestmark = pytest.mark.slow

FILES = (1, 6)  # of a run: half of it is written when the kill comes, in the first checkpoint and in a later one


def recipe(folder: Path, base: Path) -> Path:
    folder.mkdir()
    content = {
        "base": str(base),
        "out": str(folder / "adapter"),
        "memory": {"rank": 4, "granularity": "message"},
        "data": {
            "path": str(write_talks(folder / "talks.jsonl")),
            "group_by_length": True,
            "recent_turns": 1,
            "eval_path": str(folder / "talks.jsonl"),
            "max_write_tokens": 200,
            "max_read_tokens": 90,
        },
        "objective": {"context_dropout": 0.5},
        "training": {
            "epochs": 2,
            "batch_size": 3,
            "learning_rate": 1e-2,
            "save_every": 3,
            "eval_every": 5,
            "eval_episodes": 4,
        },
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_a_run_killed_while_writing_a_checkpoint_resumes_bit_for_bit(checkpoint, tmp_path):
    train(load_recipe(recipe(tmp_path / "whole", checkpoint)))
    killed, halted = recipe(tmp_path / "killed", checkpoint), tmp_path / "halted"
    run = tmp_path / "killed" / "adapter.run"
    for number, file in enumerate(FILES):
        process = forked_process(train_until, killed, bool(checkpoints(run)), file, halted)
        process.start()
        while not halted.exists():
            assert process.is_alive()
            time.sleep(0.01)
        process.kill()
        process.join()
        halted.unlink()
        assert len(checkpoints(run)) == number == len(list(run.glob("checkpoint-*"))) - 1
    train(load_recipe(killed), resume=True)
    expected, weights = (load_file(tmp_path / name / "adapter" / WEIGHTS_FILE) for name in ("whole", "killed"))
    for name, weight in expected.items():
        assert torch.equal(weights[name], weight), f"{name} differs by {(weights[name] - weight).abs().max()}"
    assert not run.exists()


@pytest.mark.parametrize("kept", ["model.safetensors", "optimizer.pt"])
def test_an_incomplete_checkpoint_is_ignored(kept, checkpoint, tmp_path):
    """The state of the Trainer is written last: without it, or with half of it, the checkpoint before counts."""
    for step in (3, 6):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / kept).write_bytes(b"")
        (folder / "trainer_state.json").write_text(f'{{"global_step": {step}}}')
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-6"]
    (tmp_path / "checkpoint-6" / "trainer_state.json").write_text('{"global_step": 6')
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-3"]

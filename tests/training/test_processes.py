"""Training on several processes gives the same result as on one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file
from training.talks import write_talks

from deltamem_tool.adapter.config_file import SUMMARY_FILE, WEIGHTS_FILE
from deltamem_tool.recipe.load import load_recipe
from deltamem_tool.training import train
from deltamem_tool.training.run_folder import checkpoints

pytestmark = pytest.mark.slow

SAME_TOLERANCE = 1e-5  # float32; weights move by about 0.1
STEPS = 10
ROOT = Path(__file__).parents[2]


def write_recipe(folder: Path, base: Path, batch: int, **training) -> Path:
    talks = str(write_talks(folder / "talks.jsonl"))
    content = {
        "base": str(base),
        "out": str(folder / "adapter"),
        "memory": {"rank": 4, "state_heads": 2},
        "data": {"path": talks, "eval_path": talks, "max_write_tokens": 200, "max_read_tokens": 60},
        "objective": {"write_sparsity": 0.5, "write_target": 0.1, "full_context_kl": 0.2, "history_kl": 0.3},
        "training": {"batch_size": batch, "gradient_accumulation": 2, "learning_rate": 1e-2, **training},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def surroundings(**more: str) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path, **more}


def launched(*command: str, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    command = (sys.executable, "-m", *command)
    environment = surroundings(**environment)
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stdout + result.stderr
    return result


TRAIN = ("-m", "deltamem_tool", "train")
TORCHRUN = ("torch.distributed.run", "--nproc-per-node", "2", "--standalone", *TRAIN)
FSDP2 = str(ROOT / "recipes" / "accelerate" / "fsdp2.yaml")
ACCELERATE = ("accelerate.commands.launch", "--config_file", FSDP2, "--num_processes", "2")
OPTIONS = {"steps": STEPS, "save_every": 2, "eval_every": 2, "eval_episodes": 4}


def killed(*command: str, folder: Path, run: Path, output_file: Path, **environment: str) -> None:
    """Start what `launched` would run to its end, and kill it when its second checkpoint is there."""
    with output_file.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", *command], cwd=folder, env=surroundings(**environment), stderr=file
        )
    while len(checkpoints(run)) < 2:
        assert process.poll() is None, output_file.read_text()
        time.sleep(0.01)
    for each in [*psutil.Process(process.pid).children(recursive=True), process]:
        each.kill()
    process.wait()


def test_two_processes_match_one(checkpoint, tmp_path):
    """The same steps over the same conversations: with other token counts on each, with evaluation, and killed in the
    middle of a later epoch. Until then each has the whole base; resumed, they share it as the shipped file says."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    train(load_recipe(write_recipe(tmp_path / "one", checkpoint, batch=4, **OPTIONS)))
    folder, run, output_file = tmp_path / "two", tmp_path / "two" / "adapter.run", tmp_path / "said"
    recipe = str(write_recipe(folder, checkpoint, batch=2, **OPTIONS))
    killed(*TORCHRUN, recipe, folder=folder, run=run, output_file=output_file)
    assert not (folder / "adapter").exists()
    result = launched(*ACCELERATE, *TRAIN, recipe, "--resume", "--json", folder=folder)
    assert "Each of 2 processes holds" in result.stderr
    assert json.loads(result.stdout)["steps"] == STEPS
    adapters = [tmp_path / name / "adapter" for name in ("one", "two")]
    expected, actual = (load_file(adapter / WEIGHTS_FILE) for adapter in adapters)
    for name, weight in expected.items():
        torch.testing.assert_close(actual[name], weight, atol=SAME_TOLERANCE, rtol=0)
    logs = [json.loads((adapter / SUMMARY_FILE).read_text())["log"] for adapter in adapters]
    assert len([row for row in logs[0] if "loss" in row]) == STEPS
    for one, two in zip(*logs, strict=True):
        for key in one.keys() & {"loss", "answer", "sparsity", "kl", "gates", "eval_loss", "eval_loss_zero"}:
            assert abs(one[key] - two[key]) < 10 * SAME_TOLERANCE, f"{key} of step {one['step']}"
    assert any("eval_loss" in row for row in logs[0]) and any("kl" in row for row in logs[0])
    assert {path.name for path in folder.iterdir()} == {"adapter", "recipe.yaml", "talks.jsonl"}

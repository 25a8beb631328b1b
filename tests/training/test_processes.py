"""Several processes learn what one learns."""

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

from deltamem_tool.adapter import WEIGHTS_FILE
from deltamem_tool.adapter_config import SUMMARY_FILE
from deltamem_tool.recipe import load_recipe
from deltamem_tool.training import train
from deltamem_tool.training.run_folder import checkpoints

SAME_TOLERANCE = 1e-5  # float32; weights move by about 0.1
STEPS = 24
RESUMED_TOLERANCE = 1e-3  # of losses about 4: Adam makes much of the last bits; other conversations differ by 0.1
ROOT = Path(__file__).parents[2]


def write_recipe(folder: Path, base: Path, batch: int, **training) -> Path:
    talks = str(write_talks(folder / "talks.jsonl"))
    said = {
        "base": str(base),
        "out": str(folder / "adapter"),
        "memory": {"rank": 4, "state_heads": 2},
        "data": {"path": talks, "eval_path": talks, "max_write_tokens": 200, "max_read_tokens": 60},
        "objective": {"write_sparsity": 0.5, "write_target": 0.1, "full_context_kl": 0.2},
        "training": {"steps": 5, "batch_size": batch, "gradient_accumulation": 2, "learning_rate": 1e-2, **training},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(said))
    return path


def surroundings(**more: str) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path, **more}


def launched(*command: str, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    command = (sys.executable, "-m", *command)
    environment = surroundings(**environment)
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


TORCHRUN = ("torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "deltamem_tool", "train")
ACCELERATE = ("accelerate.commands.launch", "--config_file", "fsdp.yaml", "-m", "deltamem_tool", "train")
FSDP = """
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
mixed_precision: 'no'
num_machines: 1
num_processes: 2
machine_rank: 0
main_training_function: main
"""


DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true"}  # as its launcher sets it
EVALUATED = {"eval_every": 2, "eval_episodes": 4}


@pytest.fixture(scope="module")
def alone(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    train(load_recipe(write_recipe(folder, checkpoint, batch=4, **EVALUATED)))
    return folder / "adapter"


def test_two_processes_go_on_where_they_were(checkpoint, tmp_path):
    """Killed in the middle of a later epoch: conversations are taken in the order in which one process takes them. What
    a launcher says of splitting is noted and left aside."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    options = {"steps": STEPS, "gradient_accumulation": 1, "save_every": 4, "scheduler": "constant"}
    one = write_recipe(tmp_path / "one", checkpoint, batch=4, **options)
    two = write_recipe(tmp_path / "two", checkpoint, batch=2, **options)
    train(load_recipe(one))
    run = tmp_path / "two" / "adapter.run"
    command = [sys.executable, "-m", *TORCHRUN, str(two)]
    process = subprocess.Popen(command, cwd=tmp_path, env=surroundings(), stderr=subprocess.DEVNULL)
    while len(checkpoints(run)) < 2 or checkpoints(run)[-1].name == "checkpoint-4":
        assert process.poll() is None
        time.sleep(0.01)
    for each in [*psutil.Process(process.pid).children(recursive=True), process]:
        each.kill()
    process.wait()
    done = launched(*TORCHRUN, str(two), "--resume", "--json", folder=tmp_path, **DEEPSPEED)
    assert "DeepSpeed splits what is trained" in done.stderr and "FSDP" not in done.stderr
    assert json.loads(done.stdout)["steps"] == STEPS
    logs = [json.loads((tmp_path / name / "adapter" / SUMMARY_FILE).read_text())["log"] for name in ("one", "two")]
    losses = [[row["loss"] for row in log if "loss" in row] for log in logs]
    assert len(losses[0]) == STEPS
    for step, (expected, found) in enumerate(zip(*losses, strict=True), start=1):
        assert abs(expected - found) < RESUMED_TOLERANCE, f"step {step}"


def test_two_processes_equal_one(alone, checkpoint, tmp_path):
    """The same steps over the same conversations: with other token counts on each, and with evaluation. Both wishes for
    splitting are noted and left aside."""
    (tmp_path / "fsdp.yaml").write_text(FSDP)
    recipe = write_recipe(tmp_path, checkpoint, batch=2, **EVALUATED)
    done = launched(*ACCELERATE, str(recipe), folder=tmp_path, **DEEPSPEED)
    assert "FSDP and DeepSpeed splits what is trained" in done.stderr
    expected, found = (load_file(adapter / WEIGHTS_FILE) for adapter in (alone, tmp_path / "adapter"))
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, atol=SAME_TOLERANCE, rtol=0)
    logs = [json.loads((adapter / SUMMARY_FILE).read_text())["log"] for adapter in (alone, tmp_path / "adapter")]
    for one, two in zip(*logs, strict=True):
        for key in one.keys() & {"loss", "answer", "sparsity", "kl", "gates", "eval_loss", "eval_loss_zero"}:
            assert abs(one[key] - two[key]) < 10 * SAME_TOLERANCE, key
    assert any("eval_loss" in row for row in logs[0]) and any("kl" in row for row in logs[0])
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "fsdp.yaml", "recipe.yaml", "talks.jsonl"}

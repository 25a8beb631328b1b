"""`patch` reads a few columns of a checkpoint: its peak memory must not grow with the weights."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.tiny import as_bin, save_checkpoint, tiny_config, tiny_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

CHECKPOINT_BYTES = 290 * 2**20
ALLOWED_GROWTH = 50 * 2**20  # a sixth of the checkpoint; the measured growth is far less
FORMATS = ("safetensors", "torch")
# Each checkpoint is patched and loaded by a fork, which has its own peak.
_MEASURE = """
import json, os, re, sys
from pathlib import Path
from transformers import AutoModelForCausalLM
from deltamem_tool import DeltaMemConfig
from deltamem_tool.adapter.create import create_adapter

def peak():  # not ru_maxrss, which a child inherits from the process that started it
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

for folder in sys.argv[1:]:
    if child := os.fork():
        if os.waitpid(child, 0)[1]:
            sys.exit(folder)
        continue
    config = DeltaMemConfig(delta_init="base_slice")
    create_adapter(folder + "/small", config, folder + "/small-adapter")  # everything is imported and warm
    before = peak()
    create_adapter(folder + "/large", config, folder + "/large-adapter")
    patched = peak()
    model = AutoModelForCausalLM.from_pretrained(folder + "/large")
    sum(tensor.sum() for tensor in model.state_dict().values())
    print(json.dumps([patched - before, peak() - before]), flush=True)
    os._exit(0)
"""


def write_safetensors(folder: Path) -> None:
    """Half of it is attention, whose columns are spread over the whole file."""
    sizes = {"vocab_size": 20_000, "hidden_size": 1024, "intermediate_size": 16, "head_dim": 256}
    config = {**sizes, "num_attention_heads": 16, "num_key_value_heads": 1}
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(tiny_model().config.__class__(**config, num_hidden_layers=4))
    weights = {name: torch.zeros(weight.shape) for name, weight in skeleton.state_dict().items()}
    large = folder / "large"
    large.mkdir()
    save_file(weights, large / "model.safetensors", {"format": "pt"})
    skeleton.config.architectures = ["Qwen3ForCausalLM"]
    skeleton.config.save_pretrained(large)
    save_checkpoint(folder / "small", hidden_size=64)


def write_torch(folder: Path) -> None:
    """Four files of 48 MiB, half of it attention."""
    sizes = {"hidden_size": 1024, "intermediate_size": 16, "num_attention_heads": 16, "head_dim": 256}
    config = tiny_config(**sizes, num_key_value_heads=1, num_hidden_layers=6, vocab_size=1024)
    as_bin(AutoModelForCausalLM.from_config(config), folder / "large", pieces=4)
    as_bin(tiny_model(hidden_size=64), folder / "small")


@pytest.fixture(scope="module")
def growths(tmp_path_factory) -> dict[str, tuple[int, int, int]]:
    """For each format: the bytes of a checkpoint, and the growth of a process's peak memory when it patches the
    checkpoint, and when it also loads it."""
    folders = [tmp_path_factory.mktemp(name) for name in FORMATS]
    write_safetensors(folders[0])
    write_torch(folders[1])
    command = [sys.executable, "-c", _MEASURE, *map(str, folders)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=240)
    stored = [
        sum(file.stat().st_size for file in (folder / "large").iterdir() if file.suffix in (".safetensors", ".bin"))
        for folder in folders
    ]
    for folder in folders:
        shutil.rmtree(folder)
    return {
        name: (size, *json.loads(line))
        for name, size, line in zip(FORMATS, stored, result.stdout.splitlines(), strict=True)
    }


def test_patching_needs_little_memory(growths):
    """Peak memory grows by far less than the checkpoint."""
    stored, patching, loading = growths["safetensors"]
    assert stored > CHECKPOINT_BYTES
    assert loading > CHECKPOINT_BYTES, "the meter does not see what is read"
    assert patching < ALLOWED_GROWTH, f"{patching / 2**20:.0f} MiB"


def test_patching_torch_files_needs_little_memory(growths):
    stored, patching, loading = growths["torch"]
    assert stored > 180 * 2**20
    assert loading > stored * 0.9, "the meter does not see what is read"
    assert patching < stored / 4, f"{patching / 2**20:.0f} of {stored / 2**20:.0f} MiB"

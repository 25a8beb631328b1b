"""`patch` reads a few columns of a checkpoint: its peak memory must not grow with the weights."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny import as_bin, save_checkpoint, tiny_config, tiny_model
from transformers import AutoModelForCausalLM

CHECKPOINT_BYTES = 290 * 2**20
ALLOWED_GROWTH = 50 * 2**20  # a sixth of the checkpoint; what was measured is far less
_MEASURE = """
import re, sys
from pathlib import Path
from transformers import AutoModelForCausalLM
from deltamem_tool import DeltaMemConfig
from deltamem_tool.adapter import create_adapter

def peak():  # not ru_maxrss, which a child inherits from the process that started it
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

small, large, out = sys.argv[1:]
config = DeltaMemConfig(delta_init="base_slice")
create_adapter(small, config, out + "/small-adapter")  # everything is imported and warm
before = peak()
create_adapter(large, config, out + "/large-adapter")
patched = peak()
sum(tensor.sum() for tensor in AutoModelForCausalLM.from_pretrained(large).state_dict().values())
print(patched - before, peak() - before)
"""


def growth(small: Path, large: Path, out: Path) -> tuple[int, int]:
    """By how many bytes the peak of a process grows when it patches `large`, and when it loads it as well."""
    command = [sys.executable, "-c", _MEASURE, str(small), str(large), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=240)
    patching, loading = (int(part) for part in done.stdout.split())
    return patching, loading


def test_patching_needs_little_memory(tmp_path):
    """Peak memory grows by far less than the checkpoint: half of it is attention, whose columns are all over it."""
    sizes = {"vocab_size": 20_000, "hidden_size": 1024, "intermediate_size": 16, "head_dim": 256}
    config = {**sizes, "num_attention_heads": 16, "num_key_value_heads": 1}
    large = tmp_path / "large"
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(tiny_model().config.__class__(**config, num_hidden_layers=4))
    weights = {name: torch.zeros(weight.shape) for name, weight in skeleton.state_dict().items()}
    large.mkdir()
    save_file(weights, large / "model.safetensors", {"format": "pt"})
    skeleton.config.architectures = ["Qwen3ForCausalLM"]
    skeleton.config.save_pretrained(large)
    del weights
    assert (large / "model.safetensors").stat().st_size > CHECKPOINT_BYTES
    small = save_checkpoint(tmp_path / "small", hidden_size=64)
    patching, loading = growth(small, large, tmp_path)
    shutil.rmtree(large)
    assert loading > CHECKPOINT_BYTES, "the meter does not see what is read"
    assert patching < ALLOWED_GROWTH, f"{patching / 2**20:.0f} MiB"


def test_patching_torch_files_needs_little_memory(tmp_path):
    """Four files of 48 MiB, half of it attention."""
    sizes = {"hidden_size": 1024, "intermediate_size": 16, "num_attention_heads": 16, "head_dim": 256}
    config = tiny_config(**sizes, num_key_value_heads=1, num_hidden_layers=6, vocab_size=1024)
    model = AutoModelForCausalLM.from_config(config)
    as_bin(model, tmp_path / "large", pieces=4)
    stored = sum(file.stat().st_size for file in (tmp_path / "large").glob("*.bin"))
    assert stored > 180 * 2**20
    del model
    as_bin(tiny_model(hidden_size=64), tmp_path / "small")
    patching, loading = growth(tmp_path / "small", tmp_path / "large", tmp_path)
    assert loading > stored * 0.9, "the meter does not see what is read"
    assert patching < stored / 4, f"{patching / 2**20:.0f} of {stored / 2**20:.0f} MiB"

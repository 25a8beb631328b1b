"""A base sharded over two processes (transformers' tensor parallel plan) matches a single process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from base_model.tiny_configs import tiny_config
from baselines.loras import make_lora
from baselines.statics import make_static
from helpers.forked_process import forked_process
from helpers.processes import together
from helpers.tiny import randomise, save_checkpoint, tiny_tokenizer
from memory.tensor_parallel import PROCESSES, exact, in_float64, rank, refused, results
from transformers import AutoModelForCausalLM

from deltamem_tool import DeltaMemConfig, attach, save_adapter
from deltamem_tool.evaluation.records import RECORDS_FILE
from deltamem_tool.memory.attach import adapter_of

pytestmark = pytest.mark.slow

STATES = ("states", "states of the chat", "states of generate")
TOLERANCE = 1e-5  # float32: the processes add up the same products in another order
# In float64 there is no other order to see: what is left would be a mistake. In float32, tiny models of these types are
# up to 5e-5 apart, and each side is as far from float64 (docs/training.md).
EXACT = 1e-12
TYPES = ("olmo2", "mistral", "granite", "gemma2", "phi3")  # the last has q, k and v in one projection
# With o_norm, a Δo that is added in each process and then once more in their sum would show as well.
CASES = {
    "qwen3": {"branches": ("q", "k", "v", "o"), "o_norm": True, "delta_scale": "branch"},
    "llama": {"branches": ("q", "k", "v", "o"), "granularity": "message", "state_heads": 2},
}


def make(folder: Path, name: str) -> Path:
    """Creates an adapter with its base, a LoRA and a static adapter."""
    heads = {"num_key_value_heads": 2}  # which two processes can share
    base = save_checkpoint(folder / "base", tiny_tokenizer(), name=name, **heads)
    model = AutoModelForCausalLM.from_pretrained(base)
    randomise(attach(model, DeltaMemConfig(rank=4, **CASES[name])))
    save_adapter(model, folder / "adapter")
    make_static(model, adapter_of(model).config, folder / "static")
    make_lora(base, folder / "lora")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """For each case, the folder with the results of two processes."""
    base = tmp_path_factory.mktemp("parallel")
    folders = {name: make(base / name, name) for name in CASES}
    processes = [forked_process(rank, number, list(folders.values())) for number in range(PROCESSES)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(200)
    assert [process.exitcode for process in processes] == [0] * PROCESSES
    return folders


@pytest.mark.parametrize("name", CASES)
def test_two_processes_match_one(folders, name):
    one = results(folders[name], "cpu")
    two = [torch.load(folders[name] / f"rank-{number}.pt", weights_only=False) for number in range(PROCESSES)]
    alone, together = ((folders[name] / f"records-{device}" / RECORDS_FILE).read_bytes() for device in ("cpu", "tp"))
    assert alone == together  # one of the two processes has written them
    for each in two:
        assert each["words"] == one["words"]
        assert each["bytes"] < 0.7 * one["bytes"]  # in so small a base, the embedding, which both have, is a large part
        for kind in ("logits", *STATES):
            torch.testing.assert_close(each[kind], one[kind], atol=TOLERANCE, rtol=0)
        for found, expected in zip(each["columns"], one["columns"], strict=True):
            assert torch.equal(found, expected)
    for kind in ("logits", *STATES):
        torch.testing.assert_close(two[0][kind], two[1][kind], atol=0, rtol=0)


def test_a_number_of_processes_that_would_split_heads_raises(tmp_path):
    together(3, refused, make(tmp_path, "qwen3"))


def test_two_processes_are_exact_in_float64(tmp_path):
    folders = []
    for name in TYPES:
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(tiny_config(name)).save_pretrained(tmp_path / name / "base")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name / "base")
        randomise(attach(model, DeltaMemConfig(rank=4, branches=("q", "k", "v", "o"))))
        save_adapter(model, tmp_path / name / "adapter")
        folders.append(tmp_path / name)
    together(PROCESSES, exact, folders)
    for folder in folders:
        one = in_float64(folder)
        for number in range(PROCESSES):
            two = torch.load(folder / f"exact-{number}.pt", weights_only=False)
            torch.testing.assert_close(two, one, atol=EXACT, rtol=0, msg=lambda said, of=folder: f"{of.name}: {said}")

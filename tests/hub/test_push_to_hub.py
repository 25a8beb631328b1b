"""transformers' own `push_to_hub`, of a model with a memory."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny import logits, randomise, save_checkpoint
from transformers import AutoModelForCausalLM

from deltamem_tool import DeltaMemConfig, attach, load
from deltamem_tool.adapter.config_file import CONFIG_FILE, WEIGHTS_FILE

REPO = "someone/memory"


@pytest.mark.parametrize("by_saving", [False, True])
def test_only_the_adapter_is_pushed(hub, monkeypatch, tmp_path, by_saving):
    monkeypatch.setenv("HF_TOKEN", "hf_write")
    base = save_checkpoint(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    randomise(attach(model, DeltaMemConfig(rank=4)))
    if by_saving:
        model.save_pretrained(tmp_path / "mine", push_to_hub=True, repo_id=REPO, commit_message="Mine")
    else:
        model.push_to_hub(REPO, commit_message="Mine")
    assert set(hub.files_at(REPO)) == {CONFIG_FILE, WEIGHTS_FILE, "README.md", ".gitattributes"}
    assert hub.repo(REPO).resolve("main").message == "Mine"
    assert torch.equal(logits(load(REPO)), logits(model))

"""The commands on hybrid models: patch, train, export, run and chat."""

from __future__ import annotations

import json
import re
from statistics import mean

import pytest
import yaml
from cli.chatting import piped
from cli.command import Done
from helpers.hybrids import hybrid_base
from helpers.tiny import listing

from deltamem_tool.memory.file import read_memory

TYPES = ("qwen3_5_text", "nemotron_h")  # a gated delta rule with convolutions; Mamba 2 and layers without either
STEPS = 20
LINES = ("my dog is Rex", "what is the name of my dog?", "thank you")
OPTIONS = ("--max-new-tokens", "8")


def succeeded(result: Done) -> str:
    assert result.code == 0, result.err
    return result.out


@pytest.fixture
def checkpoint(request, tokenizer, tmp_path_factory, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path_factory.mktemp("base") / "model"
    tokenizer.save_pretrained(folder)
    hybrid_base(request.param, tokenizer).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", TYPES, indirect=True)
def test_a_hybrid_goes_from_checkpoint_to_chat(checkpoint, deltamem, monkeypatch, tmp_path):
    succeeded(deltamem("patch", checkpoint, "--out", "adapter", "--rank", 4))
    recipe = {"base": str(checkpoint), "out": "trained", "adapter": "adapter", "data": {"facts_last": 2}}
    recipe["training"] = {"steps": STEPS, "batch_size": 4, "learning_rate": 0.02}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    losses = [loss for _, loss in json.loads(succeeded(deltamem("train", "recipe.yaml", "--json")))["losses"]]
    assert len(losses) == STEPS and mean(losses[-5:]) < mean(losses[:5])
    succeeded(deltamem("export", "trained", "--out", "onnx"))

    answers = {}
    for model in ("onnx", "trained"):
        piped(monkeypatch, "\n".join(LINES))
        answers[model] = succeeded(deltamem("chat", model, "--memory", f"{model}.safetensors", *OPTIONS))
    assert answers["onnx"] == answers["trained"]
    assert read_memory("onnx.safetensors").shape == read_memory("trained.safetensors").shape

    options = ("--prompt", LINES[1], "--memory", "trained.safetensors", *OPTIONS)  # PyTorch's file, in ONNX Runtime
    succeeded(deltamem("run", "onnx", *options, "--save-memory", "after.safetensors"))
    assert read_memory("after.safetensors").digest() != read_memory("trained.safetensors").digest()
    shown = succeeded(deltamem("inspect", "onnx"))
    assert "ssm_state" not in shown and "mechanism.branches" in shown and not re.search("[a-z]…", shown)


@pytest.mark.parametrize("checkpoint", ["lfm2"], indirect=True)
def test_unsupported_exports_of_a_hybrid_give_one_clear_error(checkpoint, deltamem, tmp_path):
    succeeded(deltamem("patch", checkpoint, "--out", "adapter", "--rank", 4))
    before = listing(tmp_path)
    for options, words in (
        (("--max-length", "128"), ("fixed length", "Leave --max-length out")),
        (("--target", "genai"), ("the target genai", "Choose another target")),
    ):
        deltamem("export", "adapter", "--out", "onnx", *options).assert_short_error(*words)
    assert listing(tmp_path) == before

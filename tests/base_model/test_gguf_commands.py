"""From a GGUF file to an ONNX folder: every command accepts it like a folder with the same weights."""

from __future__ import annotations

import io
import json

import pytest
import yaml
from helpers.tiny import listing
from helpers.tiny_gguf import tiny_gguf
from safetensors.torch import load_file

from deltamem_tool.adapter.folder import read_adapter
from deltamem_tool.base_model.checkpoint import BaseCheckpoint
from deltamem_tool.base_model.tokenizer import tokenizer_of

MEMORY = {"memory": {"rank": 4, "delta_init": "base_slice"}}
RECIPE = {
    "data": {"max_write_tokens": 3000, "max_read_tokens": 400, "facts_first": 1, "facts_last": 1},
    "training": {"steps": 1, "batch_size": 1},
}
FEW = ("--conditions", "zero_state")
POSITIONS = 8192  # a character is a token, nearly


@pytest.fixture
def bases(tmp_path):
    """A GGUF file, and a folder with the same weights and the same tokenizer."""
    file, folder = tmp_path / "tiny.gguf", tmp_path / "folder"
    tiny_gguf(file, kind="Q8_0", max_position_embeddings=POSITIONS)
    model = BaseCheckpoint(str(file)).load()
    model.save_pretrained(folder)
    tokenizer_of(model).save_pretrained(folder)
    return {"gguf": file, "folder": folder}


def trained(deltamem, base, name, **sections):
    """Train an adapter, or a LoRA, on `base`."""
    out = base.with_name(name)
    recipe = base.with_name(f"{name}.yaml")
    contents = {**(sections or MEMORY), **RECIPE, "base": str(base), "out": str(out)}
    recipe.write_text(yaml.safe_dump(contents))
    dry = deltamem("train", recipe, "--dry-run", "--json")
    assert dry.code == 0, dry.err
    result = deltamem("train", recipe)
    assert result.code == 0, result.err
    return out, json.loads(dry.out)


@pytest.mark.slow
def test_every_command_accepts_a_gguf_file(bases, tmp_path, deltamem, monkeypatch):
    adapters, plans, scores, chats = {}, {}, {}, {}
    for kind, base in bases.items():
        adapters[kind], plans[kind] = trained(deltamem, base, f"of-{kind}")
        recall = ("--task", "recall", "--set", "facts=[1]", "--set", "episodes=2", "--limit", "2", *FEW, "--json")
        result = deltamem("eval", adapters[kind], *recall)
        assert result.code == 0, result.err
        scores[kind] = json.loads(result.out)["scores"]
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"My dog is Rex.\nWho is my dog?\n")))
        result = deltamem("chat", adapters[kind], "--max-new-tokens", "8")
        assert result.code == 0, result.err
        chats[kind] = result.out
    weights = {kind: load_file(adapter / "deltamem.safetensors") for kind, adapter in adapters.items()}
    assert all((weights["gguf"][name] == own).all() for name, own in weights["folder"].items())
    assert plans["gguf"] == plans["folder"] and scores["gguf"] == scores["folder"] and chats["gguf"] == chats["folder"]
    # Either base is that of both adapters.
    assert deltamem("eval", adapters["gguf"], "--base", bases["folder"], *recall).code == 0
    result = deltamem("export", adapters["gguf"], "--out", tmp_path / "onnx", "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out)["base_model"] == "tiny.gguf"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"My dog is Rex.\nWho is my dog?\n")))
    assert deltamem("chat", tmp_path / "onnx", "--max-new-tokens", "8").out == chats["gguf"]


@pytest.mark.slow
def test_a_lora_on_a_gguf_file(bases, deltamem):
    adapter, _ = trained(deltamem, bases["gguf"], "adapter")
    lora, _ = trained(deltamem, bases["gguf"], "lora", lora={"rank": 2})
    recall = ("--task", "recall", "--set", "facts=[1]", "--set", "episodes=2", "--limit", "2", "--json")
    result = deltamem("eval", adapter, "--lora", lora, *recall)
    assert result.code == 0 and "lora" in json.loads(result.out)["scores"], result.err


def test_the_folder_of_the_file_is_not_overwritten(bases, tmp_path, deltamem):
    (tmp_path / "own").mkdir()
    file = bases["gguf"].rename(tmp_path / "own" / "tiny.gguf")
    before = listing(tmp_path)
    result = deltamem("patch", file, "--out", tmp_path / "own", "--overwrite")
    result.assert_short_error("has the base model in it", "Choose another folder", code=1)
    assert listing(tmp_path) == before


@pytest.mark.real_model
def test_an_adapter_for_a_published_file_fits_its_checkpoint(smollm2_gguf, smollm2, tmp_path, deltamem, monkeypatch):
    """`patch` reads what it reads of the converted checkpoint, to which the adapter goes as well; and it answers."""
    options = ("--delta-init", "base_slice", "--branches", "v,o", "--layers", "back:4")
    for base, name in ((smollm2_gguf, "of-gguf"), (smollm2, "of-folder")):
        assert deltamem("patch", base, "--out", tmp_path / name, *options).code == 0
    file, folder = (read_adapter(tmp_path / name) for name in ("of-gguf", "of-folder"))
    assert file.base.fingerprint == folder.base.fingerprint and file.fingerprint == folder.fingerprint
    assert deltamem("patch", smollm2_gguf, "--out", tmp_path / "untrained").code == 0
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"What is the capital of France?\n")))
    result = deltamem("chat", tmp_path / "untrained", "--max-new-tokens", "12")
    assert result.code == 0 and "Paris" in result.out, result.err

"""Unsupported and damaged checkpoints: a three-line error, exit code 1, and nothing written."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from helpers.tiny import listing, patched_model, save_checkpoint, tiny_model
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, BertModel, MambaConfig, MambaForCausalLM

from deltamem_tool import load, save_adapter

INDEX = "model.safetensors.index.json"


@pytest.fixture
def assert_patch_fails(tmp_path, deltamem):
    """`assert_patch_fails(base, *words)` checks that patching `base` fails with these words and writes nothing."""

    def check(base: Path, *words: str) -> None:
        before = listing(tmp_path)
        result = deltamem("patch", base, "--out", tmp_path / "adapter", "--delta-init", "base_slice")
        result.assert_short_error(*words, code=1)
        assert len(result.err.strip().splitlines()) == 3, result.err
        assert listing(tmp_path) == before

    return check


@pytest.fixture
def base(tmp_path):
    return save_checkpoint(tmp_path / "base")


@pytest.fixture
def sharded_checkpoint(tmp_path):
    tiny_model().save_pretrained(tmp_path / "pieces", max_shard_size="20KB")
    return tmp_path / "pieces"


@pytest.fixture
def torch_checkpoint(base):
    weights = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    torch.save(weights, base / "pytorch_model.bin")
    return base


def change(folder: Path, **changes) -> Path:
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps({name: value for name, value in config.items() if value is not ...}))
    return folder


# Other kinds of models


@pytest.mark.parametrize("kind", [BertModel, BertForMaskedLM])
def test_an_encoder_is_rejected(kind, assert_patch_fails, tmp_path):
    config = BertConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)
    kind(config).save_pretrained(tmp_path / "base")
    assert_patch_fails(tmp_path / "base", "bert", kind.__name__)


def test_a_state_space_model_is_rejected(assert_patch_fails, tmp_path):
    config = MambaConfig(hidden_size=16, state_size=4, num_hidden_layers=1, vocab_size=32)
    MambaForCausalLM(config).save_pretrained(tmp_path / "base")
    assert_patch_fails(tmp_path / "base", "mamba", "ttention")


def test_a_diffusion_pipeline_is_rejected(assert_patch_fails, tmp_path):
    (tmp_path / "base" / "unet").mkdir(parents=True)
    (tmp_path / "base" / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    save_file({"conv_in.weight": torch.zeros(2)}, tmp_path / "base" / "unet" / "diffusion_pytorch_model.safetensors")
    assert_patch_fails(tmp_path / "base", "diffusion", "model_index.json", "such as Qwen3")


@pytest.mark.parametrize(
    ("model_type", "near"),
    [("qwen33", "qwen3"), ("lama", "llama"), ("bertt", "bert"), ("xyzzy-9", "No architecture of transformers")],
)
def test_an_unknown_model_type_is_rejected(assert_patch_fails, base, model_type, near):
    assert_patch_fails(change(base, model_type=model_type), repr(model_type), "not known", near, "update transformers")


@pytest.mark.parametrize("value", [..., None, 3, ["qwen3"]])
def test_a_config_without_a_model_type_is_rejected(assert_patch_fails, base, value):
    assert_patch_fails(change(base, model_type=value), "base", "model_type", "another folder")


def test_an_empty_folder_is_rejected(assert_patch_fails, tmp_path):
    (tmp_path / "empty").mkdir()
    assert_patch_fails(tmp_path / "empty", "not a checkpoint", "config.json")


def test_an_invalid_config_is_rejected(assert_patch_fails, base):
    assert_patch_fails(change(base, hidden_size="wide"), "config.json", "hidden_size")


# Weights that are cut short


@pytest.mark.parametrize("keeps", [0, 5, 300, -1])
def test_a_truncated_file_is_rejected(assert_patch_fails, base, keeps):
    file = base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keeps])
    assert_patch_fails(base, "model.safetensors", "cut short", "again")


@pytest.mark.parametrize("keeps", [None, 100, -1])
@pytest.mark.parametrize("which", [0, -1])
def test_a_truncated_or_missing_shard_is_rejected(assert_patch_fails, sharded_checkpoint, keeps, which):
    """Covers each shard, whether or not `patch` has to read it."""
    piece = sorted(sharded_checkpoint.glob("model-*.safetensors"))[which]
    content = piece.read_bytes()
    piece.unlink()
    if keeps is not None:
        piece.write_bytes(content[:keeps])
    assert_patch_fails(sharded_checkpoint, piece.name, "again")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {}}',
        '{"weight_map": {"lm_head.weight": 3}}',
        '{"weight_map": {"lm_head.weight": "../base/model.safetensors"}}',
    ],
)
def test_a_damaged_index_is_rejected(assert_patch_fails, sharded_checkpoint, base, content):
    (sharded_checkpoint / INDEX).write_text(content)
    assert_patch_fails(sharded_checkpoint, INDEX, "not a weight index", "again")


def test_an_index_that_names_the_wrong_files_is_rejected(assert_patch_fails, sharded_checkpoint):
    index = json.loads((sharded_checkpoint / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    index["weight_map"]["lm_head.weight"] = next(
        file for file in files if file != index["weight_map"]["lm_head.weight"]
    )
    (sharded_checkpoint / INDEX).write_text(json.dumps(index))
    assert_patch_fails(sharded_checkpoint, "lm_head.weight", "again")


@pytest.mark.parametrize("keeps", [0, 5, 3000, -1])
def test_a_truncated_torch_file_is_rejected(assert_patch_fails, torch_checkpoint, keeps):
    file = torch_checkpoint / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:keeps])
    assert_patch_fails(torch_checkpoint, "pytorch_model.bin", "cut short", "again")


def test_a_torch_file_that_would_run_code_is_rejected(assert_patch_fails, torch_checkpoint, tmp_path):
    class Runs:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    for write in (lambda file: torch.save({"weight": Runs()}, file), lambda f: f.write_bytes(pickle.dumps(Runs()))):
        write(torch_checkpoint / "pytorch_model.bin")
        assert_patch_fails(torch_checkpoint, "pytorch_model.bin", "more than weights")
    torch.save(["no", "names"], torch_checkpoint / "pytorch_model.bin")
    assert_patch_fails(torch_checkpoint, "pytorch_model.bin", "not a mapping")
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_without_weights_is_rejected(assert_patch_fails, base):
    (base / "model.safetensors").unlink()
    assert_patch_fails(base, "no safetensors weights", "pytorch_model.bin", "save_pretrained")


@pytest.mark.parametrize("lost", ["model.layers.1.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight"])
def test_missing_weights_are_not_initialised_randomly(assert_patch_fails, base, tmp_path, lost):
    """transformers would fill them with random numbers and only warn."""
    model = patched_model()
    save_adapter(model, tmp_path / "patched")
    weights = load_file(base / "model.safetensors")
    del weights[lost]
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    if "q_proj" in lost:
        assert_patch_fails(base, lost, "lacks")
    with pytest.raises(Exception, match="lacks 1 of its model's weights") as refusal:
        load(tmp_path / "patched", base=str(base))
    assert lost in str(refusal.value)


def test_a_base_damaged_after_patch_is_named_by_load(base, tmp_path, deltamem):
    assert deltamem("patch", base, "--out", tmp_path / "adapter").code == 0
    backup = shutil.copy(base / "model.safetensors", tmp_path / "kept")
    (base / "model.safetensors").write_bytes(Path(backup).read_bytes()[:-8])
    before = listing(tmp_path)
    deltamem("export", tmp_path / "adapter", "--out", tmp_path / "onnx").assert_short_error("cut short", code=1)
    assert listing(tmp_path) == before

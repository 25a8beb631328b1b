"""An adapter loads only on the base model it was made for, wherever that is stored; a memory only with its adapter."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from adapter.folders import CONFIG, change_config
from helpers.tiny import listing, randomise, save_checkpoint
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from deltamem_tool import DeltaMemConfig, MemoryCache, MemoryState, attach, detach, load, save_adapter
from deltamem_tool.adapter.config_file import CONFIG_FILE
from deltamem_tool.adapter.create import create_adapter
from deltamem_tool.adapter.folder import read_adapter
from deltamem_tool.adapter.reference.convert import convert
from deltamem_tool.base_model.checkpoint import BaseCheckpoint
from deltamem_tool.errors import AdapterError, ArchitectureError, DeltaMemError, HubError
from deltamem_tool.memory.attach import adapter_of


def test_a_different_base_raises(adapter, base, tmp_path):
    for options in ({"seed": 3}, {"name": "llama"}):
        other = save_checkpoint(tmp_path / f"other{len(options)}{options}", **options)
        with pytest.raises(AdapterError, match="another base model") as refusal:
            load(adapter, base=str(other))
        assert str(other) in str(refusal.value) and str(base) in str(refusal.value)
    tuned = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        tuned.model.layers[1].self_attn.q_proj.weight[0, 3] += 1e-3
    tuned.save_pretrained(tmp_path / "tuned")
    with pytest.raises(AdapterError, match="another base model"):
        load(adapter, base=str(tmp_path / "tuned"))


def test_the_same_base_in_another_place_is_accepted(adapter, base, tmp_path):
    shutil.copytree(base, tmp_path / "moved")
    assert adapter_of(load(adapter, base=str(tmp_path / "moved"))) is not None


def test_other_layers_can_be_attached_to_a_loaded_base(adapter, tmp_path):
    model = load(adapter)
    detach(model)
    randomise(attach(model, DeltaMemConfig(rank=4, layers=(1,))))
    save_adapter(model, tmp_path / "other")
    assert adapter_of(load(tmp_path / "other")).layer_indices == [1]
    assert read_adapter(tmp_path / "other").base.fingerprint == read_adapter(adapter).base.fingerprint


def test_a_changed_base_is_not_recorded_as_the_original(adapter, tmp_path):
    """The record of the base that a loaded model keeps is removed together with the adapter."""
    model = load(adapter)
    detach(model)
    model.name_or_path = ""
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.add_(1.0)
    attach(model, DeltaMemConfig(rank=4))
    save_adapter(model, tmp_path / "other")
    assert read_adapter(tmp_path / "other").base.fingerprint != read_adapter(adapter).base.fingerprint


@pytest.mark.parametrize(
    ("options", "asked"),
    [
        ({}, "recorded"),
        ({"base": "HERE"}, "recorded"),
        ({"base": "HERE", "base_revision": "other"}, "other"),
        ({"base_revision": "other"}, "other"),
        ({"base": "THERE"}, None),
    ],
)
def test_the_revision_of_the_base_is_recorded(adapter, base, tmp_path, monkeypatch, options, asked):
    recorded = json.loads((adapter / CONFIG_FILE).read_text())["base"]
    change_config(adapter, base={**recorded, "revision": "recorded"})
    revisions = []

    class Watched(BaseCheckpoint):
        def __init__(self, name, revision=None, trust_remote_code=False):
            revisions.append(revision)
            super().__init__(name, revision, trust_remote_code)

    monkeypatch.setattr("deltamem_tool.adapter.find_base.BaseCheckpoint", Watched)
    monkeypatch.setattr(
        "deltamem_tool.adapter.find_base.check_revision", lambda *_: None
    )  # a folder takes the place of the Hub
    moved = shutil.copytree(base, tmp_path / "moved")
    places = {"HERE": str(base), "THERE": str(moved)}
    load(adapter, **{name: places.get(value, value) for name, value in options.items()})
    assert revisions == [asked]


def test_a_revision_for_a_local_folder_raises(adapter, base, tmp_path):
    before = listing(tmp_path)
    for call in (
        lambda: load(adapter, revision="v2"),
        lambda: load(adapter, base_revision="v2"),
        lambda: load(adapter, base=str(base), base_revision="v2"),
        lambda: load("builtin:adapter", revision="v2"),
        lambda: create_adapter(str(base), DeltaMemConfig(rank=4), tmp_path / "new", revision="v2"),
        lambda: convert(str(adapter), tmp_path / "new", to="reference", revision="v2"),
    ):
        with pytest.raises(HubError, match="has no revision v2"):
            call()
    assert listing(tmp_path) == before


def test_a_missing_base_is_named(adapter, tmp_path):
    change_config(adapter, base={**json.loads((adapter / CONFIG_FILE).read_text())["base"], "name": "/gone/away"})
    with pytest.raises(HubError, match="/gone/away"):
        load(adapter)


def test_a_damaged_base_raises(base, tmp_path):
    broken = shutil.copytree(base, tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    for content, says in ((None, "cannot be read"), ("[]", "not a checkpoint|not JSON"), ("{", "not JSON")):
        if content is not None:
            (broken / "config.json").write_text(content)
        with pytest.raises(ArchitectureError, match=says):
            create_adapter(str(broken), CONFIG, tmp_path / "out")
    shutil.copy(base / "config.json", broken)
    weights.unlink()
    with pytest.raises(ArchitectureError, match="no safetensors weights"):
        create_adapter(str(broken), CONFIG, tmp_path / "out")
    (broken / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ArchitectureError, match="index"):
        create_adapter(str(broken), CONFIG, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_only_a_part_of_a_weight_is_read(base):
    checkpoint = BaseCheckpoint(str(base))
    name = "model.layers.0.self_attn.q_proj.weight"
    whole = load_file(base / "model.safetensors")[name]
    assert torch.equal(checkpoint.read(name, columns=slice(0, 3)), whole[:, :3])
    assert torch.equal(checkpoint.read(name, slice(0, 1), slice(0, 5)), whole[:1, :5])
    assert all(parameter.is_meta for parameter in checkpoint.skeleton().parameters())


def test_a_memory_of_other_adapter_weights_raises(adapter):
    model = load(adapter)
    memory = adapter_of(model).empty_memory(1)
    with torch.no_grad():
        next(adapter_of(model).parameters()).add_(1e-3)
    with pytest.raises(DeltaMemError, match="another adapter"):
        MemoryCache(model, memory=MemoryState(memory.layers, memory.adapter))

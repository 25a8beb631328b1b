"""Writing an adapter folder: it loads bit for bit, and is never written in part."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from adapter.folders import CONFIG
from helpers.model_runs import cache_of
from helpers.tiny import listing, patched_model, randomise, save_checkpoint, tiny_model, tokens, weights_of
from transformers import AutoModelForCausalLM

from deltamem_tool import DeltaMemConfig, MemoryCache, attach, load, save_adapter
from deltamem_tool.adapter.config_file import CONFIG_FILE, FORMAT_VERSION, WEIGHTS_FILE
from deltamem_tool.adapter.create import create_adapter
from deltamem_tool.errors import AdapterError, ArchitectureError, DeltaMemError
from deltamem_tool.io.atomic import atomic_folder
from deltamem_tool.memory.attach import adapter_of


@pytest.mark.parametrize("name", ["qwen3", "llama", "smollm3"])
@pytest.mark.parametrize("delta_init", ["zero", "base_slice"])
def test_create_adapter_equals_attach_and_save(name, delta_init, tmp_path):
    base = save_checkpoint(tmp_path / "base", name=name)
    config = DeltaMemConfig(rank=4, branches=("q", "k", "v", "o"), delta_init=delta_init)
    torch.manual_seed(7)
    folder = create_adapter(str(base), config, tmp_path / "patched")
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(7)
    attach(model, config)
    save_adapter(model, tmp_path / "attached")
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        assert (tmp_path / "patched" / file).read_bytes() == (tmp_path / "attached" / file).read_bytes()
    assert folder.num_parameters() == adapter_of(model).num_parameters()
    deltas = [tensor for key, tensor in weights_of(folder).items() if ".delta." in key]
    if delta_init == "zero":
        assert all(not delta.any() for delta in deltas)
    else:
        for delta in deltas:
            torch.testing.assert_close(delta.norm(dim=0), torch.full((4,), 0.05))
        key = "layers.1.delta.o.weight"
        column = model.model.layers[1].self_attn.o_proj.weight[:, 2]
        torch.testing.assert_close(weights_of(folder)[key][:, 2], column / column.norm() * 0.05)


def test_the_config_records_base_and_mechanism(adapter, base):
    config = json.loads((adapter / CONFIG_FILE).read_text())
    assert set(listing(adapter)) == {CONFIG_FILE, WEIGHTS_FILE}
    assert config["base"]["name"] == str(base) and config["base"]["model_type"] == "qwen3"
    assert DeltaMemConfig.from_dict(config["mechanism"]) == DeltaMemConfig(rank=4)
    assert config["format_version"] == FORMAT_VERSION


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_adapter_equals_the_saved_one(dtype, tmp_path):
    base = tmp_path / "base"
    tiny_model().to(dtype).save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto").eval()
    randomise(attach(model, DeltaMemConfig(rank=4)))
    save_adapter(model, tmp_path / "adapter")
    loaded = load(tmp_path / "adapter")
    ids = tokens(2, 9)
    with torch.no_grad():
        expected, logits = model(ids), loaded(ids)
    assert logits.logits.dtype == dtype and torch.equal(logits.logits, expected.logits)
    assert not loaded.training
    assert adapter_of(loaded).fingerprint == adapter_of(model).fingerprint
    # so a memory that was written before can continue afterwards
    memory = cache_of(expected).memory
    MemoryCache(loaded, memory=memory)
    save_adapter(loaded, tmp_path / "again")
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "adapter" / file).read_bytes()


def test_a_sharded_base_gives_the_same_adapter(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    assert len(list((tmp_path / "base").glob("model-*.safetensors"))) > 2
    model.save_pretrained(tmp_path / "whole")
    adapters = []
    for name in ("base", "whole"):
        torch.manual_seed(0)
        adapters.append(create_adapter(str(tmp_path / name), CONFIG, tmp_path / f"{name}-adapter"))
    pieces, whole = adapters
    assert pieces.base.fingerprint == whole.base.fingerprint
    assert all(torch.equal(weights_of(pieces)[key], tensor) for key, tensor in weights_of(whole).items())
    assert load(tmp_path / "base-adapter", base=str(tmp_path / "whole")) is not None
    shard = next((tmp_path / "base").glob("model-*.safetensors"))
    shard.unlink()
    for _ in range(2):
        with pytest.raises(ArchitectureError, match="fetch the checkpoint again"):
            create_adapter(str(tmp_path / "base"), CONFIG, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_model_never_saved_has_no_recorded_base(tmp_path, monkeypatch):
    """Its base must not default to the working directory."""
    other = save_checkpoint(tmp_path / "other", seed=5)
    monkeypatch.chdir(other)
    model = patched_model()
    save_adapter(model, tmp_path / "adapter")
    model.save_pretrained(tmp_path / "base")
    ids = tokens(1, 5)
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "adapter", base=str(tmp_path / "base"))(ids).logits, model(ids).logits)
    with pytest.raises(AdapterError, match="another base model"):
        load(tmp_path / "adapter", base=str(other))
    with pytest.raises(DeltaMemError, match="base"):
        load(tmp_path / "adapter")


def test_existing_files_are_not_overwritten(base, adapter, tmp_path):
    before = (adapter / WEIGHTS_FILE).read_bytes()
    with pytest.raises(DeltaMemError, match="already exists"):
        create_adapter(str(base), CONFIG, adapter)
    with pytest.raises(DeltaMemError, match="already exists"):
        save_adapter(patched_model(), adapter)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(DeltaMemError, match="already exists"):
        create_adapter(str(base), CONFIG, tmp_path / "file")
    assert (adapter / WEIGHTS_FILE).read_bytes() == before and (tmp_path / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    create_adapter(str(base), CONFIG, tmp_path / "empty")
    create_adapter(str(base), CONFIG, adapter, overwrite=True)
    assert (adapter / WEIGHTS_FILE).read_bytes() != before
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "file", "empty"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_output_that_cannot_be_written_raises_before_the_work(tmp_path, monkeypatch, overwrite):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "here" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "below")
    before = listing(tmp_path)
    mounted = tmp_path / "here"
    for out, says in (
        (".", "folder you are in"),
        (tmp_path / "here" / "below", "folder you are in"),
        ("..", "folder you are in"),
        ("/proc", "mount point"),
        (tmp_path / "file" / "adapter", "is not a folder"),
        (tmp_path / "file" / "deep" / "adapter", "is not a folder"),
    ):
        with pytest.raises(DeltaMemError, match=says):
            create_adapter("/no/base/is/looked/for", CONFIG, out, overwrite=overwrite)
        with pytest.raises(DeltaMemError, match=says), atomic_folder(out, overwrite):
            raise AssertionError("the work began")
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != mounted)
    with pytest.raises(DeltaMemError, match="not have permission to write"):
        create_adapter("/no/base/is/looked/for", CONFIG, mounted / "adapter", overwrite=overwrite)
    assert listing(tmp_path) == before


def test_the_old_folder_is_never_lost(tmp_path, monkeypatch):
    """If neither the new folder can take its place nor the old one return, the old one is still on the disk."""
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "notes.txt").write_text("mine")
    calls, real = [], os.rename

    def broken(*args):
        calls.append(args)
        if len(calls) > 1:
            raise OSError(5, "Input/output error")
        real(*args)

    monkeypatch.setattr(os, "rename", broken)
    with pytest.raises(OSError, match="Input/output"), atomic_folder(tmp_path / "adapter", overwrite=True) as staged:
        (staged / "new").write_text("new")
    assert [path.read_text() for path in tmp_path.rglob("*") if path.is_file()] == ["mine"]


def test_the_base_is_never_overwritten(tmp_path):
    base = save_checkpoint(tmp_path / "base")
    before = listing(tmp_path)
    with pytest.raises(DeltaMemError, match="base model"):
        create_adapter(str(base), CONFIG, tmp_path / "x" / ".." / "base", overwrite=True)
    model = AutoModelForCausalLM.from_pretrained(base)
    attach(model)
    with pytest.raises(DeltaMemError, match="base model"):
        save_adapter(model, base, overwrite=True)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("fails", ["fsync", "write", "rename"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_full_disk_leaves_nothing_behind(base, adapter, tmp_path, monkeypatch, fails, overwrite):
    before = listing(tmp_path)
    content = (adapter / WEIGHTS_FILE).read_bytes()
    calls = []

    def full(*args, **options):
        calls.append(args)
        if fails == "rename" and len(calls) == 1 and overwrite:
            return real(*args)  # the old folder is moved away; moving the new one in fails
        if fails == "rename" and len(calls) == 3:
            return real(*args)  # and the old one is moved back
        raise OSError(28, "No space left on device")

    owner, name = {"fsync": (os, "fsync"), "write": (Path, "write_bytes"), "rename": (os, "rename")}[fails]
    real = getattr(owner, name)
    monkeypatch.setattr(owner, name, full)
    with pytest.raises(OSError, match="No space"):
        create_adapter(str(base), CONFIG, adapter if overwrite else tmp_path / "new", overwrite=overwrite)
    monkeypatch.undo()
    assert calls and listing(tmp_path) == before and (adapter / WEIGHTS_FILE).read_bytes() == content


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_saving_an_invalid_adapter_raises(adapter, tmp_path, value):
    model = load(adapter)
    with torch.no_grad():
        adapter_of(model).layer(1).gate.bias[0] = value
    before, content = listing(tmp_path), (adapter / WEIGHTS_FILE).read_bytes()
    with pytest.raises(AdapterError, match=r"(?s)NaN or infinity.*layers.1.gate.bias.*learning rate"):
        save_adapter(model, adapter, overwrite=True)
    assert listing(tmp_path) == before and (adapter / WEIGHTS_FILE).read_bytes() == content

"""The adapter folder: the same bits back, or a refusal that says what differs, and never half a folder."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import listing, patched_model, randomise, save_checkpoint, tiny_model, tokens
from transformers import AutoModelForCausalLM

from deltamem_tool import DeltaMemConfig, MemoryCache, MemoryState, attach, detach, load, save_adapter
from deltamem_tool.adapter import CONFIG_FILE, FORMAT_VERSION, WEIGHTS_FILE, create_adapter, read_adapter
from deltamem_tool.checkpoint import BaseCheckpoint
from deltamem_tool.errors import AdapterError, ArchitectureError, DeltaMemError, HubError
from deltamem_tool.files import folder_whole
from deltamem_tool.surgery import adapter_of

CONFIG = DeltaMemConfig(rank=4, heads=("q", "o"), delta_init="base_slice")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("base") / "model", name="qwen3")


@pytest.fixture
def adapter(base, tmp_path):
    """The folder of an adapter that matters, on `base`."""
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    randomise(attach(model, DeltaMemConfig(rank=4)))
    save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter"


def change_config(folder, **changes):
    said = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps({**said, **changes}))


def change_weights(folder, change):
    tensors = load_file(folder / WEIGHTS_FILE)
    save_file(change(tensors), folder / WEIGHTS_FILE)


# Written


@pytest.mark.parametrize("name", ["qwen3", "llama", "smollm3"])
@pytest.mark.parametrize("delta_init", ["zero", "base_slice"])
def test_patching_a_folder_is_attaching_to_its_model(name, delta_init, tmp_path):
    base = save_checkpoint(tmp_path / "base", name=name)
    config = DeltaMemConfig(rank=4, heads=("q", "k", "v", "o"), delta_init=delta_init)
    torch.manual_seed(7)
    folder = create_adapter(str(base), config, tmp_path / "patched")
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(7)
    attach(model, config)
    save_adapter(model, tmp_path / "attached")
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        assert (tmp_path / "patched" / file).read_bytes() == (tmp_path / "attached" / file).read_bytes()
    assert folder.num_parameters() == adapter_of(model).num_parameters()
    deltas = [tensor for key, tensor in folder.tensors.items() if ".delta." in key]
    if delta_init == "zero":
        assert all(not delta.any() for delta in deltas)
    else:
        for delta in deltas:
            torch.testing.assert_close(delta.norm(dim=0), torch.full((4,), 0.05))
        key = "layers.1.delta.o.weight"
        column = model.model.layers[1].self_attn.o_proj.weight[:, 2]
        torch.testing.assert_close(folder.tensors[key][:, 2], column / column.norm() * 0.05)


def test_the_folder_says_what_it_is_for(adapter, base):
    said = json.loads((adapter / CONFIG_FILE).read_text())
    assert set(listing(adapter)) == {CONFIG_FILE, WEIGHTS_FILE}
    assert said["base"]["name"] == str(base) and said["base"]["model_type"] == "qwen3"
    assert DeltaMemConfig.from_dict(said["mechanism"]) == DeltaMemConfig(rank=4)
    assert said["format_version"] == FORMAT_VERSION


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loaded_is_what_was_saved(dtype, tmp_path):
    base = tmp_path / "base"
    tiny_model().to(dtype).save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto").eval()
    randomise(attach(model, DeltaMemConfig(rank=4)))
    save_adapter(model, tmp_path / "adapter")
    loaded = load(tmp_path / "adapter")
    ids = tokens(2, 9)
    with torch.no_grad():
        expected, found = model(ids), loaded(ids)
    assert found.logits.dtype == dtype and torch.equal(found.logits, expected.logits)
    assert not loaded.training
    assert adapter_of(loaded).fingerprint == adapter_of(model).fingerprint
    # so a memory written before goes on after
    memory = expected.past_key_values.memory
    MemoryCache(loaded, memory=memory)
    save_adapter(loaded, tmp_path / "again")
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "adapter" / file).read_bytes()


def test_a_base_in_pieces(tmp_path):
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
    assert all(torch.equal(pieces.tensors[key], tensor) for key, tensor in whole.tensors.items())
    assert load(tmp_path / "base-adapter", base=str(tmp_path / "whole")) is not None
    shard = next((tmp_path / "base").glob("model-*.safetensors"))
    shard.unlink()
    with pytest.raises(ArchitectureError, match="fetch the checkpoint again"):
        for _ in range(2):
            create_adapter(str(tmp_path / "base"), CONFIG, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_model_that_was_never_on_disk(tmp_path, monkeypatch):
    """The working directory must not be taken for its base."""
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


def test_what_is_there_is_not_overwritten_unasked(base, adapter, tmp_path):
    before = (adapter / WEIGHTS_FILE).read_bytes()
    with pytest.raises(DeltaMemError, match="already there"):
        create_adapter(str(base), CONFIG, adapter)
    with pytest.raises(DeltaMemError, match="already there"):
        save_adapter(patched_model(), adapter)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(DeltaMemError, match="already there"):
        create_adapter(str(base), CONFIG, tmp_path / "file")
    assert (adapter / WEIGHTS_FILE).read_bytes() == before and (tmp_path / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    create_adapter(str(base), CONFIG, tmp_path / "empty")
    create_adapter(str(base), CONFIG, adapter, overwrite=True)
    assert (adapter / WEIGHTS_FILE).read_bytes() != before
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "file", "empty"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_cannot_be_written_is_refused_before_the_work(tmp_path, monkeypatch, overwrite):
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
        (tmp_path / "file" / "adapter", "is no folder"),
        (tmp_path / "file" / "deep" / "adapter", "is no folder"),
    ):
        with pytest.raises(DeltaMemError, match=says):
            create_adapter("/no/base/is/looked/for", CONFIG, out, overwrite=overwrite)
        with pytest.raises(DeltaMemError, match=says), folder_whole(out, overwrite):
            raise AssertionError("the work began")
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != mounted)
    with pytest.raises(DeltaMemError, match="may not write"):
        create_adapter("/no/base/is/looked/for", CONFIG, mounted / "adapter", overwrite=overwrite)
    assert listing(tmp_path) == before


def test_the_old_folder_is_never_lost(tmp_path, monkeypatch):
    """Neither the new one takes its place nor does it come back: it is still on the disk."""
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "notes.txt").write_text("mine")
    calls, real = [], os.rename

    def broken(*args):
        calls.append(args)
        if len(calls) > 1:
            raise OSError(5, "Input/output error")
        real(*args)

    monkeypatch.setattr(os, "rename", broken)
    with pytest.raises(OSError, match="Input/output"), folder_whole(tmp_path / "adapter", overwrite=True) as staged:
        (staged / "new").write_text("new")
    assert [path.read_text() for path in tmp_path.rglob("*") if path.is_file()] == ["mine"]


def test_a_link_is_written_through(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with folder_whole(tmp_path / "link") as staged:
        (staged / "new").write_text("new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "elsewhere" / "new").read_text() == "new"


def test_the_base_itself_is_never_overwritten(tmp_path):
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
    kept = (adapter / WEIGHTS_FILE).read_bytes()
    calls = []

    def full(*args, **options):
        calls.append(args)
        if fails == "rename" and len(calls) == 1 and overwrite:
            return real(*args)  # the old folder steps aside; taking its place fails
        if fails == "rename" and len(calls) == 3:
            return real(*args)  # and it comes back
        raise OSError(28, "No space left on device")

    owner, name = {"fsync": (os, "fsync"), "write": (Path, "write_bytes"), "rename": (os, "rename")}[fails]
    real = getattr(owner, name)
    monkeypatch.setattr(owner, name, full)
    with pytest.raises(OSError, match="No space"):
        create_adapter(str(base), CONFIG, adapter if overwrite else tmp_path / "new", overwrite=overwrite)
    monkeypatch.undo()
    assert calls and listing(tmp_path) == before and (adapter / WEIGHTS_FILE).read_bytes() == kept


# Read


def test_another_base_is_refused(adapter, base, tmp_path):
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


def test_the_same_base_elsewhere_is_taken(adapter, base, tmp_path):
    shutil.copytree(base, tmp_path / "moved")
    assert adapter_of(load(adapter, base=str(tmp_path / "moved"))) is not None


def test_other_layers_can_be_attached_to_a_loaded_base(adapter, tmp_path):
    model = load(adapter)
    detach(model)
    randomise(attach(model, DeltaMemConfig(rank=4, layers=(1,))))
    save_adapter(model, tmp_path / "other")
    assert adapter_of(load(tmp_path / "other")).layer_indices == [1]
    assert read_adapter(tmp_path / "other").base.fingerprint == read_adapter(adapter).base.fingerprint


def test_a_changed_base_is_not_taken_for_the_one_it_was(adapter, tmp_path):
    """What a loaded model remembers of its base goes with the adapter."""
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
def test_the_revision_of_the_base(adapter, base, tmp_path, monkeypatch, options, asked):
    said = json.loads((adapter / CONFIG_FILE).read_text())["base"]
    change_config(adapter, base={**said, "revision": "recorded"})
    seen = []

    class Watched(BaseCheckpoint):
        def __init__(self, name, revision=None, trust_remote_code=False):
            seen.append(revision)
            super().__init__(name, revision, trust_remote_code)

    monkeypatch.setattr("deltamem_tool.adapter.BaseCheckpoint", Watched)
    moved = shutil.copytree(base, tmp_path / "moved")
    places = {"HERE": str(base), "THERE": str(moved)}
    load(adapter, **{name: places.get(value, value) for name, value in options.items()})
    assert seen == [asked]


def test_a_base_that_is_gone_is_named(adapter, tmp_path):
    change_config(adapter, base={**json.loads((adapter / CONFIG_FILE).read_text())["base"], "name": "/gone/away"})
    with pytest.raises(HubError, match="/gone/away"):
        load(adapter)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: {k: v for k, v in t.items() if k != "layers.1.key.weight"}, ["missing layers.1.key.weight"]),
        (
            lambda t: t | {name.replace("layers.1.", "layers.7."): tensor.clone() for name, tensor in t.items()},
            ["extra layers.7.key.weight"],
        ),
        (lambda t: t | {"layers.0.gate.bias": torch.zeros(5)}, ["layers.0.gate.bias is [5], not [4]"]),
        (
            lambda t: t | {"layers.0.gate.bias": torch.zeros(4).half(), "more": torch.zeros(1)},
            ["layers.0.gate.bias is torch.float16, not float32", "extra more"],
        ),
    ],
    ids=["missing", "extra", "misshapen", "dtype"],
)
def test_tensors_that_do_not_fit_are_named(adapter, change, says):
    change_weights(adapter, change)
    with pytest.raises(AdapterError, match="does not fit") as refusal:
        load(adapter)
    for part in says:
        assert part in str(refusal.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: {k: v for k, v in t.items() if k != "layers.1.key.weight"}, "missing layers.1.key.weight"),
        (lambda t: t | {"layers.7.key.weight": torch.zeros(4, 32)}, "missing layers.7.query.weight"),
        (lambda t: t | {"more": torch.zeros(1)}, "extra more"),
        (lambda t: t | {"layers.0.delta.k.weight": torch.zeros(8, 4)}, "extra layers.0.delta.k.weight"),
        (lambda t: t | {"layers.0.gate.bias": torch.zeros(5)}, "layers.0.gate.bias is [5], not [4]"),
        (lambda t: t | {"layers.0.key.weight": torch.zeros(5, 32)}, "layers.0.key.weight is [5, 32], not [4, any]"),
        (lambda t: t | {"layers.0.key.weight": torch.zeros(4)}, "layers.0.key.weight is [4], not [4, any]"),
        (lambda t: t | {"layers.0.gate.bias": torch.zeros(4).half()}, "float16, not float32"),
        (lambda t: {"more": torch.zeros(1)}, "it has no layer"),
    ],
)
def test_an_adapter_is_read_strictly_without_its_base(adapter, change, says):
    assert read_adapter(adapter).layer_indices == [0, 1] and read_adapter(adapter).memory_bytes == 2 * 4 * 4 * 4
    change_weights(adapter, change)
    with pytest.raises(AdapterError, match="does not fit") as refusal:
        read_adapter(adapter)
    assert says in str(refusal.value)


def test_layers_that_the_config_does_not_name_are_refused(adapter):
    change_config(adapter, mechanism=DeltaMemConfig(rank=4, layers=(1,)).to_dict())
    with pytest.raises(AdapterError, match="extra layers.0.key.weight"):
        read_adapter(adapter)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_an_adapter_that_could_not_be_loaded_is_not_saved(adapter, tmp_path, value):
    model = load(adapter)
    with torch.no_grad():
        adapter_of(model).memory(1).gate.bias[0] = value
    before, content = listing(tmp_path), (adapter / WEIGHTS_FILE).read_bytes()
    with pytest.raises(AdapterError, match="(?s)NaN or infinity.*layers.1.gate.bias.*learning rate"):
        save_adapter(model, adapter, overwrite=True)
    assert listing(tmp_path) == before and (adapter / WEIGHTS_FILE).read_bytes() == content


def test_numbers_that_are_none_are_refused(adapter):
    change_weights(adapter, lambda t: t | {"layers.0.gate.bias": torch.full((4,), torch.nan)})
    with pytest.raises(AdapterError, match="layers.0.gate.bias.*NaN"):
        load(adapter)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "not JSON"),
        ('{"format": "deltamem-adapter", ', "not JSON"),
        ("[]", "no adapter folder"),
        ('"deltamem-adapter"', "no adapter folder"),
        ("{}", "no adapter folder"),
        ('{"format": "peft", "format_version": 1}', "no adapter folder"),
        ('{"format": "deltamem-adapter", "format_version": true}', "no adapter folder"),
        ('{"format": "deltamem-adapter", "format_version": 1}', "damaged"),
        ('{"format": "deltamem-adapter", "format_version": 1, "mechanism": [1], "base": {}}', "damaged"),
        ('{"format": "deltamem-adapter", "format_version": 1, "mechanism": {"rank": 4}, "base": {}}', "damaged"),
        ('{"format": "deltamem-adapter", "format_version": 1, "mechanism": {"layers": 3}, "base": {}}', "damaged"),
        ('{"format": "deltamem-adapter", "format_version": 1, "mechanism": {"ranks": 4}, "base": {}}', "ranks"),
        (b"\xff\xfe", "not JSON"),
    ],
)
def test_damaged_configs_are_refused(adapter, content, says):
    (adapter / CONFIG_FILE).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(AdapterError, match=says):
        read_adapter(adapter)


def test_a_base_of_other_types_is_refused(adapter):
    for wrong in ({"name": 3}, {"fingerprint": None}, {"model_type": []}):
        said = json.loads((adapter / CONFIG_FILE).read_text())
        change_config(adapter, base={**said["base"], **wrong})
        with pytest.raises(AdapterError, match="damaged"):
            read_adapter(adapter)
        change_config(adapter, base=said["base"])


def test_a_newer_format_is_refused(adapter):
    change_config(adapter, format_version=FORMAT_VERSION + 1)
    with pytest.raises(AdapterError, match=r"(?s)of adapter format 2.*Update deltamem-tool"):
        load(adapter)


def test_truncated_weights_are_refused(adapter):
    whole = (adapter / WEIGHTS_FILE).read_bytes()
    for length in (0, 5, 200, len(whole) - 1):
        (adapter / WEIGHTS_FILE).write_bytes(whole[:length])
        with pytest.raises(AdapterError, match="damaged"):
            read_adapter(adapter)
    for file in (WEIGHTS_FILE, CONFIG_FILE):
        (adapter / file).unlink()
        with pytest.raises(AdapterError, match=f"no {file}"):
            read_adapter(adapter)


def test_a_damaged_base_is_refused(base, tmp_path):
    broken = shutil.copytree(base, tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    for content, says in ((None, "cannot be read"), ("[]", "no checkpoint|not JSON"), ("{", "not JSON")):
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


def test_a_memory_is_bound_to_the_weights(adapter):
    model = load(adapter)
    memory = adapter_of(model).empty_memory(1)
    with torch.no_grad():
        next(adapter_of(model).parameters()).add_(1e-3)
    with pytest.raises(DeltaMemError, match="another adapter"):
        MemoryCache(model, memory=MemoryState(memory.layers, memory.adapter))

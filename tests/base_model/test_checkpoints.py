"""Common checkpoint layouts: patching a checkpoint on disk equals attaching to the model in memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.tiny import as_bin, listing, logits, randomise, save_checkpoint, tiny_config, tiny_model, weights_of
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config

from deltamem_tool import DeltaMemConfig, attach, load, save_adapter
from deltamem_tool.adapter.create import create_adapter
from deltamem_tool.adapter.folder import read_adapter
from deltamem_tool.errors import ArchitectureError, DeltaMemError
from deltamem_tool.memory.attach import adapter_of

CONFIG = DeltaMemConfig(rank=4, branches=("q", "o"), delta_init="base_slice")


def in_pieces(model, folder: Path) -> Path:
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


def whole(model, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


FORMS = {
    "safetensors": whole,
    "sharded": in_pieces,
    "bin": as_bin,
    "sharded bin": lambda model, folder: as_bin(model, folder, pieces=3),
    "bin of old torch": lambda model, folder: as_bin(model, folder, zipped=False),
}


def assert_patched_is_attached(model, base: Path, out: Path, **options) -> None:
    """`deltamem patch` and `load` equal `attach` on `model` and its `save_adapter`, bit for bit."""
    torch.manual_seed(7)
    folder = create_adapter(str(base), CONFIG, out, **options)
    torch.manual_seed(7)
    attach(model, CONFIG)
    assert all(torch.equal(weights_of(folder)[name], own) for name, own in adapter_of(model).state_dict().items())
    loaded = load(out, **options)
    assert loaded.dtype == model.dtype
    plain = logits(model)
    assert torch.equal(logits(loaded), plain)
    for each in (model, loaded):
        randomise(adapter_of(each))
    assert torch.equal(logits(loaded), logits(model)) and not torch.equal(logits(model), plain)
    save_adapter(model, out, overwrite=True)  # its base exists only in memory
    assert torch.equal(logits(load(out, base=str(base), **options)), logits(model))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_checkpoint_layout_and_dtype(form, dtype, tmp_path):
    # Created in that dtype: `.to(dtype)` would also round the rotary frequencies, which no checkpoint does.
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(), dtype=dtype).eval()
    assert_patched_is_attached(model, FORMS[form](model, tmp_path / "base"), tmp_path / "adapter")


@pytest.mark.parametrize("form", FORMS)
def test_a_checkpoint_with_tied_embeddings(form, tmp_path):
    model = tiny_model(tie_word_embeddings=True)
    base = FORMS[form](model, tmp_path / "base")
    if form == "safetensors":
        assert "lm_head.weight" not in load_file(base / "model.safetensors")
    assert_patched_is_attached(model, base, tmp_path / "adapter")


def test_weight_names_without_the_model_prefix(tmp_path):
    """`gpt2` on the Hub has such names, because it was saved as a model without a head."""
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=96, initializer_range=0.2)
    model = AutoModelForCausalLM.from_config(config).eval()
    base = whole(model, tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    save_file({name.removeprefix("transformer."): w for name, w in weights.items()}, base / "model.safetensors")
    assert_patched_is_attached(model, base, tmp_path / "adapter")


def test_a_single_file_takes_precedence_over_an_index(tmp_path):
    """transformers loads the single file, so the same file must be inspected."""
    whole(tiny_model(seed=1), in_pieces(tiny_model(seed=0), tmp_path / "pieces"))
    base = in_pieces(tiny_model(seed=0), tmp_path / "base")
    index = base / "model.safetensors.index.json"
    content = index.read_text()
    tiny_model(seed=1).save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").rename(base / "model.safetensors")
    index.write_text(content)
    as_bin(tiny_model(seed=2), base)
    assert_patched_is_attached(tiny_model(seed=1), base, tmp_path / "adapter")


# Code in the checkpoint

_CODE = """
from pathlib import Path
Path({marker!r}).touch()
from transformers import Qwen3Config, Qwen3ForCausalLM

class OwnConfig(Qwen3Config):
    model_type = "own_model_of_this_test"

class OwnForCausalLM(Qwen3ForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def checkpoint_with_code(tmp_path, monkeypatch):
    """A checkpoint with its architecture in its own Python file, and the file that appears when that code runs."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    base = save_checkpoint(tmp_path / "base")
    (base / "own_code.py").write_text(_CODE.format(marker=str(tmp_path / "ran")))
    config = json.loads((base / "config.json").read_text())
    config |= {
        "model_type": "own_model_of_this_test",
        "architectures": ["OwnForCausalLM"],
        "auto_map": {"AutoConfig": "own_code.OwnConfig", "AutoModelForCausalLM": "own_code.OwnForCausalLM"},
    }
    (base / "config.json").write_text(json.dumps(config))
    return base, tmp_path / "ran"


def test_remote_code_runs_only_with_trust_remote_code(checkpoint_with_code, tmp_path, deltamem):
    base, ran = checkpoint_with_code
    before = listing(tmp_path)
    result = deltamem("patch", base, "--out", tmp_path / "adapter")
    result.assert_short_error("own_model_of_this_test", "Python code", str(base), "--trust-remote-code", code=1)
    assert listing(tmp_path) == before
    result = deltamem("patch", base, "--out", tmp_path / "adapter", "--trust-remote-code")
    assert result.code == 0 and ran.exists()
    ran.unlink()
    with pytest.raises(ArchitectureError, match="trust_remote_code=True"):
        load(tmp_path / "adapter")
    assert not ran.exists()
    model = load(tmp_path / "adapter", trust_remote_code=True)
    assert type(model).__name__ == "OwnForCausalLM"
    randomise(adapter_of(model))
    save_adapter(model, tmp_path / "again")  # its code is trusted already
    assert read_adapter(tmp_path / "again").base == read_adapter(tmp_path / "adapter").base


def test_remote_code_of_a_known_architecture_is_not_needed(checkpoint_with_code, tmp_path):
    base, ran = checkpoint_with_code
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "model_type": "qwen3"}))
    assert_patched_is_attached(tiny_model(), base, tmp_path / "adapter")
    assert not ran.exists()


# The Hub


def test_a_hub_id_and_its_revisions_can_be_patched(hub, tmp_path):
    """Over HTTP, with the Hub's own client."""
    first = save_checkpoint(tmp_path / "first")
    save_file({"again": torch.zeros(1)}, first / "consolidated.safetensors")  # the same weights in another format
    (first / "pytorch_model.bin").write_bytes(b"no one asks for it")
    second = in_pieces(tiny_model(seed=1), tmp_path / "second")
    (tmp_path / "diffusion").mkdir()
    (tmp_path / "diffusion" / "model_index.json").write_text("{}")
    save_file({"unet": torch.zeros(1)}, tmp_path / "diffusion" / "model.safetensors")
    commits = [hub.add_repo("someone/tiny", first), hub.add_repo("someone/tiny", second, branch="v2")]
    hub.add_repo("someone/diffusion", tmp_path / "diffusion")
    (tmp_path / "out").mkdir()
    for revision, seed, commit in (("main", 0, commits[0]), ("v2", 1, commits[1])):
        out = tmp_path / "out" / revision
        create_adapter("someone/tiny", DeltaMemConfig(rank=4), out, revision=revision)
        base = read_adapter(out).base
        assert (base.name, base.revision) == ("someone/tiny", commit)
        assert torch.equal(logits(load(out)), logits(tiny_model(seed=seed)))
    for name, revision in (("someone/tiny", "v3"), ("someone/nothing", None), ("someone/diffusion", None)):
        with pytest.raises(DeltaMemError) as caught:
            create_adapter(name, DeltaMemConfig(rank=4), tmp_path / "out" / "none", revision=revision)
        assert name in caught.value.what and caught.value.next
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"main", "v2"}
    assert hub.fetched().count("someone/tiny/model.safetensors") == 1
    for file in ("tiny/consolidated.safetensors", "tiny/pytorch_model.bin", "diffusion/model.safetensors"):
        assert f"someone/{file}" not in hub.fetched()

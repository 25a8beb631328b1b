"""An adapter made for a GGUF file, loaded on the checkpoint that the file was converted from."""

from __future__ import annotations

import io
import json
import math
import shutil
import warnings

import pytest
import torch
from adapter.folders import change_config
from helpers.publishing import onnx_folder
from helpers.tiny import logits, randomise, save_checkpoint
from helpers.tiny_gguf import tiny_gguf

from deltamem_tool import DeltaMemConfig, attach, load, save_adapter
from deltamem_tool.adapter.config_file import CONFIG_FILE
from deltamem_tool.adapter.create import create_adapter
from deltamem_tool.adapter.folder import read_adapter
from deltamem_tool.base_model.checkpoint import BaseCheckpoint
from deltamem_tool.base_model.difference import relative_difference
from deltamem_tool.base_model.tokenizer import read_tokenizer
from deltamem_tool.errors import AdapterError, OtherBaseWarning
from deltamem_tool.memory.attach import adapter_of

BRANCHES = ("q_proj", "k_proj", "v_proj", "o_proj")
SMALL = 1e-6  # for a quotient of float32 sums


@pytest.fixture
def original(tmp_path):
    """A checkpoint in float32, and a file with its weights in 8 bits."""
    tiny_gguf(tmp_path / "tiny.gguf", kind="Q8_0").save_pretrained(tmp_path / "original")
    return tmp_path / "original"


@pytest.fixture
def adapter(original, tmp_path):
    model = BaseCheckpoint(str(tmp_path / "tiny.gguf")).load()
    randomise(attach(model, DeltaMemConfig(rank=4)))
    save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter"


def whole_difference(model, other) -> float:
    """The same for models in memory, whose weights have fewer columns than are read."""
    pairs = zip(model.state_dict().items(), other.state_dict().values(), strict=True)
    weights = [(a.double(), b.double()) for (name, a), b in pairs if name.split(".")[-2] in BRANCHES]
    return math.sqrt(sum((a - b).square().sum() for a, b in weights) / sum(b.square().sum() for _, b in weights))


def test_relative_difference_of_two_bases(original, tmp_path):
    quantised, plain = (BaseCheckpoint(str(place)) for place in (tmp_path / "tiny.gguf", original))
    expected = whole_difference(quantised.load(), plain.load())
    assert 0.001 < expected < 0.01
    assert relative_difference(quantised, plain) == pytest.approx(
        expected, rel=SMALL
    )  # heads are narrower than COLUMNS
    assert relative_difference(plain, plain) == 0
    assert relative_difference(plain, BaseCheckpoint(str(save_checkpoint(tmp_path / "other")))) is None


def test_another_base_raises_with_the_difference(original, adapter, tmp_path):
    share = relative_difference(BaseCheckpoint(str(tmp_path / "tiny.gguf")), BaseCheckpoint(str(original)))
    with pytest.raises(AdapterError, match=f"another base model(.|\n)*differ by {share:.2%}(.|\n)*--allow-other-base"):
        load(adapter, base=str(original))


def test_another_base_is_allowed_with_a_warning(original, adapter, tmp_path):
    share = relative_difference(BaseCheckpoint(str(tmp_path / "tiny.gguf")), BaseCheckpoint(str(original)))
    with pytest.warns(OtherBaseWarning, match=rf"tiny\.gguf.*original.*differ by {share:.2%}"):
        model = load(adapter, base=str(original), allow_other_base=True)
    expected = BaseCheckpoint(str(original)).load()
    attach(expected, read_adapter(adapter).config).load_state_dict(adapter_of(model).state_dict())
    assert torch.equal(logits(model), logits(expected))
    save_adapter(model, tmp_path / "again")  # it now belongs to the model that it ran on
    assert torch.equal(logits(load(tmp_path / "again")), logits(model))


def test_a_missing_original_file_gives_a_warning(original, adapter, tmp_path):
    (tmp_path / "tiny.gguf").unlink()
    with pytest.warns(OtherBaseWarning, match=r"How far apart they are is not known: .*tiny\.gguf"):
        load(adapter, base=str(original), allow_other_base=True)


def test_a_base_on_the_hub_is_fetched_only_if_the_user_asks(hub, original, adapter, tmp_path):
    (tmp_path / "repository").mkdir()
    shutil.copy(tmp_path / "tiny.gguf", tmp_path / "repository")
    base = {"name": "someone/tiny:tiny.gguf", "revision": hub.add_repo("someone/tiny", tmp_path / "repository")}
    recorded = json.loads((adapter / CONFIG_FILE).read_text())["base"]
    change_config(adapter, base=recorded | base)

    def refusal() -> str:
        with pytest.raises(AdapterError, match=r"someone/tiny:tiny\.gguf") as caught:
            load(adapter, base=str(original))
        return str(caught.value)

    assert "differ by" not in refusal() and not hub.fetched()
    with pytest.warns(OtherBaseWarning, match="differ by"):
        load(adapter, base=str(original), allow_other_base=True)
    assert hub.fetched() == ["someone/tiny/tiny.gguf"]
    assert "differ by" in refusal()  # now it is in the cache
    assert hub.fetched() == ["someone/tiny/tiny.gguf"]


def test_a_base_of_other_shapes_raises(adapter, tmp_path):
    other = save_checkpoint(tmp_path / "other")
    with pytest.warns(OtherBaseWarning, match="other shapes"), pytest.raises(AdapterError, match="does not fit"):
        load(adapter, base=str(other), allow_other_base=True)


def test_the_original_base_gives_no_warning(adapter, tmp_path):
    moved = shutil.copy(tmp_path / "tiny.gguf", tmp_path / "moved.gguf")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(adapter, base=str(moved), allow_other_base=True)


def test_the_command_prints_the_warning_in_one_line(original, tmp_path, deltamem, monkeypatch):
    read_tokenizer(tmp_path / "tiny.gguf").save_pretrained(original)
    create_adapter(str(tmp_path / "tiny.gguf"), DeltaMemConfig(rank=4), tmp_path / "adapter")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Is it mine?\n")))
    options = ("--allow-other-base", "--max-new-tokens", "2")
    with pytest.warns(OtherBaseWarning, match="differ by") as caught:
        result = deltamem("chat", tmp_path / "adapter", "--base", original, *options)
    assert result.code == 0
    message = caught[0].message
    assert warnings.formatwarning(message, OtherBaseWarning, "file.py", 1) == f"Warning: {message}\n"


def test_allow_other_base_is_rejected_for_an_onnx_folder(tmp_path, deltamem):
    deltamem("chat", onnx_folder(tmp_path / "onnx"), "--allow-other-base").assert_short_error(
        "--allow-other-base: only for an adapter", code=2
    )

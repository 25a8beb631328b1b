"""A GGUF file as a base: it is read as transformers loads it, and the model equals the one that was written."""

from __future__ import annotations

import shutil
import sys

import pytest
import torch
from gguf import GGMLQuantizationType
from helpers.tiny import CHAT_TEMPLATE, listing, logits, randomise, save_checkpoint, weights_of
from helpers.tiny_gguf import tiny_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.utils import logging

from deltamem_tool import DeltaMemConfig, attach, load, save_adapter
from deltamem_tool.adapter.create import create_adapter
from deltamem_tool.adapter.folder import read_adapter
from deltamem_tool.base_model.checkpoint import BaseCheckpoint
from deltamem_tool.base_model.tokenizer import read_tokenizer, tokenizer_of
from deltamem_tool.errors import ArchitectureError, ConfigError, HubError
from deltamem_tool.memory.attach import adapter_of

CONFIG = DeltaMemConfig(rank=4, branches=("q", "k", "v", "o"), delta_init="base_slice")
UNTRAINED = DeltaMemConfig(rank=4)  # which changes nothing
ROUNDING = 1e-5  # for logits: the order of additions differs
# transformers assumes that Qwen3's heads have the width of those of the published models.
OPTIONS = {"llama": {}, "qwen3": {"head_dim": 128}, "gpt2": {}, "lfm2": {"block_auto_adjust_ff_dim": False}}
KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_1")


@pytest.fixture
def gguf(tmp_path):
    """A tiny Llama in a GGUF file, in its own folder."""
    (tmp_path / "base").mkdir()
    tiny_gguf(tmp_path / "base" / "tiny.gguf")
    return tmp_path / "base" / "tiny.gguf"


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_loaded_file_computes_what_the_original_does(name, tied, tmp_path):
    """Rows that llama.cpp stores in another order are restored, and a tied embedding is tied again."""
    file = tmp_path / "tiny.gguf"
    original = tiny_gguf(file, name, tie_word_embeddings=tied, **OPTIONS[name])
    loaded = BaseCheckpoint(str(file)).load()
    torch.testing.assert_close(logits(loaded), logits(original), rtol=0, atol=ROUNDING)
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == tied


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OPTIONS)
def test_create_adapter_equals_attach_on_the_loaded_model(name, kind, tmp_path):
    """Compared on the model that transformers itself loads, bit for bit, in every format."""
    file = tmp_path / "tiny.gguf"
    tiny_gguf(file, name, kind=kind, **OPTIONS[name])
    torch.manual_seed(7)
    folder = create_adapter(str(file), CONFIG, tmp_path / "adapter")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name)
    torch.manual_seed(7)
    attach(model, CONFIG)
    assert all(torch.equal(weights_of(folder)[name], own) for name, own in adapter_of(model).state_dict().items())
    save_adapter(model, tmp_path / "saved")
    assert read_adapter(tmp_path / "saved").base == folder.base
    assert torch.equal(logits(load(tmp_path / "saved")), logits(model))


def test_only_the_needed_columns_are_read(gguf, monkeypatch):
    checkpoint = BaseCheckpoint(str(gguf))
    whole = checkpoint.load().state_dict()
    sizes = []
    dequantize = sys.modules["gguf"].dequantize

    def watched(data, kind):
        sizes.append(data.size)
        return dequantize(data, kind)

    monkeypatch.setattr("gguf.dequantize", watched)
    name = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(checkpoint.read(name, columns=slice(0, 3)), whole[name][:, :3])
    assert torch.equal(checkpoint.read(name, slice(0, 2), slice(0, 5)), whole[name][:2, :5])
    assert sizes == [whole[name].shape[0] * 3, whole[name].shape[0] * 5]


def test_the_loaded_model_can_be_saved_as_a_checkpoint(gguf, tmp_path):
    """The saved folder is the same base, with the end token and the tokenizer of the file."""
    model = BaseCheckpoint(str(gguf)).load()
    assert model.generation_config.eos_token_id == model.config.eos_token_id == 1
    model.save_pretrained(tmp_path / "folder")
    tokenizer_of(model).save_pretrained(tmp_path / "folder")
    create_adapter(str(gguf), UNTRAINED, tmp_path / "adapter")
    again = load(tmp_path / "adapter", base=str(tmp_path / "folder"))
    assert torch.equal(logits(again), logits(model))
    assert (
        tokenizer_of(again)("the file is my own")["input_ids"] == tokenizer_of(model)("the file is my own")["input_ids"]
    )


def test_the_tokenizer_comes_from_the_file(gguf):
    tokenizer = read_tokenizer(gguf)
    assert tokenizer.chat_template == CHAT_TEMPLATE and tokenizer.eos_token == "<|end|>"
    text = "Is the café my own? 🦜"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    known = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    assert tokenizer(text)["input_ids"] == known(text)["input_ids"]


def test_a_folder_with_one_file_stands_for_the_file(gguf, tmp_path):
    """The adapter stays bound to the file if another one is added. A GGUF file in a checkpoint's folder is ignored."""
    create_adapter(str(gguf.parent), UNTRAINED, tmp_path / "adapter")
    assert read_adapter(tmp_path / "adapter").base.name == str(gguf)
    tiny_gguf(gguf.with_name("other.gguf"), seed=1)
    model = load(tmp_path / "adapter")
    assert torch.equal(logits(model), logits(BaseCheckpoint(str(gguf)).load()))
    folder = save_checkpoint(tmp_path / "folder")
    shutil.copy(gguf, folder)
    assert BaseCheckpoint(str(folder)).config.model_type == "qwen3"


def test_a_file_on_the_hub_is_loaded(hub, gguf, tmp_path):
    tiny_gguf(gguf.with_name("other.gguf"), seed=1)
    commit = hub.add_repo("someone/tiny-GGUF", gguf.parent)
    folder = create_adapter("someone/tiny-GGUF:tiny.gguf", UNTRAINED, tmp_path / "adapter")
    assert (folder.base.name, folder.base.revision) == ("someone/tiny-GGUF:tiny.gguf", commit)
    model = load(tmp_path / "adapter")
    assert torch.equal(logits(model), logits(BaseCheckpoint(str(gguf)).load()))
    assert tokenizer_of(model).chat_template == CHAT_TEMPLATE
    randomise(adapter_of(model))
    save_adapter(model, tmp_path / "again")
    assert read_adapter(tmp_path / "again").base == folder.base
    assert "someone/tiny-GGUF/other.gguf" not in hub.fetched()
    with pytest.raises(HubError, match=r"has no file none\.gguf"):
        create_adapter("someone/tiny-GGUF:none.gguf", CONFIG, tmp_path / "none")
    with pytest.raises(ArchitectureError, match=r"OWNER/NAME:FILE\.gguf"):
        create_adapter("someone/tiny-GGUF", CONFIG, tmp_path / "none")


def test_progress_is_shown_where_transformers_shows_its_own(gguf, capfd):
    shown, before = [], logging.is_progress_bar_enabled()
    for switch in (logging.enable_progress_bar, logging.disable_progress_bar):
        switch()
        BaseCheckpoint(str(gguf)).load()
        shown.append("GGUF tensors" in capfd.readouterr().err)
    if before:
        logging.enable_progress_bar()
    assert shown == [True, False]


# Files that cannot be read


@pytest.fixture
def assert_patch_fails(tmp_path, deltamem):
    """`assert_patch_fails(base, *words)` checks that patching `base` fails with these words and writes nothing."""

    def check(base, *words: str) -> None:
        before = listing(tmp_path)
        deltamem("patch", base, "--out", tmp_path / "adapter").assert_short_error(*words, code=1)
        assert listing(tmp_path) == before

    return check


@pytest.mark.parametrize("share", [0.001, 0.05, 0.5, 0.999])
def test_a_truncated_file_is_rejected(share, gguf, assert_patch_fails):
    content = gguf.read_bytes()
    gguf.write_bytes(content[: max(8, round(len(content) * share))])
    assert_patch_fails(gguf, "tiny.gguf", "cut short", "fetch it again")


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n", bytes(1000)])
def test_a_file_of_another_format_is_rejected(content, gguf, assert_patch_fails):
    gguf.write_bytes(content)
    assert_patch_fails(gguf, "is not a GGUF file", "does not begin with GGUF")


def test_an_unknown_architecture_is_rejected(gguf, assert_patch_fails):
    gguf.write_bytes(gguf.read_bytes().replace(b"llama", b"quux5"))
    assert_patch_fails(gguf, "tiny.gguf", "quux5", "not supported", "original checkpoint")


def test_a_split_file_is_rejected(gguf, assert_patch_fails):
    part = gguf.rename(gguf.with_name("tiny-00001-of-00002.gguf"))
    assert_patch_fails(part, "one of 2 parts", "llama-gguf-split --merge")
    shutil.copy(part, part.with_name("tiny-00002-of-00002.gguf"))
    assert_patch_fails(part.parent, "one of 2 parts", "llama-gguf-split --merge")
    assert_patch_fails("someone/tiny:tiny-00001-of-00002.gguf", "one of 2 parts")  # before anything is downloaded


def test_a_folder_with_several_files_is_rejected(gguf, assert_patch_fails):
    shutil.copy(gguf, gguf.with_name("other.gguf"))
    assert_patch_fails(gguf.parent, "several GGUF files", "other.gguf, tiny.gguf", "Pass one of the files")


def test_a_missing_file_is_rejected(gguf, assert_patch_fails):
    assert_patch_fails(gguf.with_name("none.gguf"), "none.gguf")


def test_an_unknown_tensor_format_is_rejected(gguf, assert_patch_fails):
    """Integers instead of float32, by the number after the tensor's name and sizes."""
    content, name = bytearray(gguf.read_bytes()), b"blk.0.attn_q.weight"
    place = content.index(name) + len(name) + 4 + 2 * 8
    assert content[place] == GGMLQuantizationType.F32
    content[place] = GGMLQuantizationType.I32
    gguf.write_bytes(content)
    assert_patch_fails(gguf, "weights in the format I32", "Q8_0")


def test_missing_weights_are_rejected(tmp_path):
    tiny_gguf(tmp_path / "tiny.gguf", leave_out=("blk.1.ffn_up.weight",))
    with pytest.raises(ArchitectureError, match="lacks 1 of its model's weights"):
        BaseCheckpoint(str(tmp_path / "tiny.gguf")).load()


def test_a_file_without_a_chat_template(tmp_path, deltamem):
    tiny_gguf(tmp_path / "tiny.gguf", template=None)
    create_adapter(str(tmp_path / "tiny.gguf"), CONFIG, tmp_path / "adapter")
    before = listing(tmp_path)
    result = deltamem("eval", tmp_path / "adapter", "--task", "recall", "--report", tmp_path / "report")
    assert result.code == 1 and "tiny.gguf has no chat template" in result.err
    assert listing(tmp_path) == before


def test_an_invalid_tokenizer_raises(gguf):
    """Its merges build a token that the vocabulary lacks."""
    gguf.write_bytes(gguf.read_bytes().replace("Ġmy".encode(), "Ġmz".encode()))
    with pytest.raises(ArchitectureError, match=r"tiny\.gguf has no tokenizer(.|\n)*Ġmy"):
        read_tokenizer(gguf)


def test_metadata_that_contradicts_the_weights_is_rejected(tmp_path, assert_patch_fails):
    """The metadata give the width of Qwen3's heads, which transformers does not read."""
    tiny_gguf(tmp_path / "tiny.gguf", "qwen3", head_dim=16)
    assert_patch_fails(tmp_path / "tiny.gguf", "blk.0.attn_q.weight is [64, 32]", "[512, 32]", "original checkpoint")


def test_quantising_on_loading_raises(gguf):
    with pytest.raises(ConfigError, match="cannot be quantised on loading"):
        BaseCheckpoint(str(gguf)).load(quantization_config=BitsAndBytesConfig(load_in_8bit=True))


def test_sharding_on_loading_raises(gguf):
    with pytest.raises(ConfigError, match="cannot be sharded on loading"):
        BaseCheckpoint(str(gguf)).load(distributed_config={"fsdp_size": 2})


def test_the_missing_gguf_package_is_named(gguf, assert_patch_fails, monkeypatch):
    installed = sys.modules["deltamem_tool.io.installation"].version

    def version(name):
        if name == "gguf":
            raise sys.modules["importlib.metadata"].PackageNotFoundError(name)
        return installed(name)

    monkeypatch.setattr("deltamem_tool.io.installation.version", version)
    assert_patch_fails(gguf, "needs gguf, which is not installed", "pip install 'deltamem-tool[gguf]'")

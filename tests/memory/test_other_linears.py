"""Linear layers that are quantised or carry a PEFT adapter."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from helpers.model_runs import cache_of
from helpers.tiny import base_parameters, logits, randomise, save_checkpoint, tiny_model, tokens
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from deltamem_tool import DeltaMemConfig, MemoryCache, attach, detach, load, save_adapter
from deltamem_tool.adapter.create import create_adapter
from deltamem_tool.adapter.folder import read_adapter
from deltamem_tool.errors import ArchitectureError, ConfigError
from deltamem_tool.memory.attach import adapter_of

CONFIG = DeltaMemConfig(rank=4, branches=("q", "o"), delta_init="base_slice")


def gptq_like(base: Path) -> Path:
    """A linear layer as GPTQ stores it: packed integers and their scales instead of a weight."""
    weights = load_file(base / "model.safetensors")
    for name in [name for name in weights if name.endswith("_proj.weight")]:
        out, wide = weights.pop(name).shape
        own = name.removesuffix("weight")
        generator = torch.Generator().manual_seed(len(weights))
        packed = torch.randint(2**31 - 1, (wide // 8, out), generator=generator, dtype=torch.int32)
        weights |= {f"{own}qweight": packed, f"{own}scales": torch.rand(1, out, generator=generator).half()}
        weights[f"{own}g_idx"] = torch.zeros(wide, dtype=torch.int32)
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    (base / "config.json").write_text(json.dumps(config))
    return base


def test_a_quantised_checkpoint_is_patched_without_its_library(tmp_path):
    base = gptq_like(save_checkpoint(tmp_path / "base"))
    other = gptq_like(save_checkpoint(tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    weights["model.layers.1.self_attn.q_proj.qweight"][0, 1] += 1
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    marks = []
    for folder in (base, other, base):
        adapter = create_adapter(str(folder), DeltaMemConfig(rank=4), tmp_path / "adapter", overwrite=True)
        marks.append(adapter.base.fingerprint)
    assert marks[0] == marks[2] != marks[1]
    with pytest.raises(ConfigError, match="quantised"):
        create_adapter(str(base), CONFIG, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_an_adapter_for_a_plain_checkpoint_fits_it_in_bitsandbytes(tmp_path):
    """A plain checkpoint is quantised when it is loaded, with the adapter of the plain one."""
    base = save_checkpoint(tmp_path / "base")
    plain = load(patched(base, tmp_path / "adapter"))
    int8 = BitsAndBytesConfig(load_in_8bit=True)
    loaded = load(tmp_path / "adapter", quantization_config=int8)
    assert type(loaded.model.layers[0].self_attn.q_proj).__name__ == "Linear8bitLt"
    close = dict(atol=0.05 * logits(plain).abs().max().item(), rtol=0)
    torch.testing.assert_close(logits(loaded), logits(plain), **close)
    # attaching it in memory gives the same
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=int8).eval()
    bare = logits(model)
    attach(model, DeltaMemConfig(rank=4))
    assert torch.equal(logits(model), bare)
    adapter_of(model).load_state_dict(adapter_of(plain).state_dict())
    assert torch.equal(logits(model), logits(loaded)) and not torch.equal(logits(model), bare)
    save_adapter(model, tmp_path / "again")
    assert read_adapter(tmp_path / "again").base.fingerprint == read_adapter(tmp_path / "adapter").base.fingerprint
    detach(model)
    assert torch.equal(logits(model), bare)
    with pytest.raises(ConfigError, match="quantised"):
        attach(model, CONFIG)


def test_a_checkpoint_saved_by_bitsandbytes_is_patched(tmp_path):
    plain = save_checkpoint(tmp_path / "plain")
    int8 = BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=int8).eval()
    model.save_pretrained(tmp_path / "base")
    patched(tmp_path / "base", tmp_path / "adapter")
    loaded = load(tmp_path / "adapter")
    attach(model, DeltaMemConfig(rank=4))
    adapter_of(model).load_state_dict(adapter_of(loaded).state_dict())
    assert torch.equal(logits(loaded), logits(model))


def patched(base: Path, out: Path) -> Path:
    """The folder of an adapter with random weights."""
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    randomise(attach(model, DeltaMemConfig(rank=4)))
    save_adapter(model, out)
    return out


# PEFT. Injected by PEFT itself: `model.add_adapter` of transformers 5.24 asks for a PEFT that is not released yet.


@torch.no_grad()
def stir(model, seed: int = 3) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)


@pytest.mark.parametrize("wrapped", [False, True], ids=["injected", "PeftModel"])
def test_a_lora_attached_before_the_memory_is_kept(wrapped, tmp_path):
    base = save_checkpoint(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    if wrapped:
        model = peft.get_peft_model(model, config).eval()
    else:
        peft.inject_adapter_in_model(config, model)
    bare = logits(AutoModelForCausalLM.from_pretrained(base).eval())
    stir(model)
    tuned = logits(model)
    assert not torch.allclose(tuned, bare)
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert any(trained.values()) and not all(trained.values())

    adapter = attach(model, DeltaMemConfig(rank=4))
    assert torch.equal(logits(model), tuned), "the LoRA stays on"
    assert not any(parameter.requires_grad for parameter in base_parameters(model))
    randomise(adapter)
    changed = logits(model)
    assert not torch.allclose(changed, tuned)
    cache = MemoryCache(model)
    with torch.no_grad():
        model(tokens(2, 4), cache=cache)
        later = model(tokens(2, 9)[:, 4:], cache=cache)
    assert cache_of(later).memory is not None
    options = {"input_ids": tokens(1, 4), "max_new_tokens": 3, "do_sample": False}
    generated = model.generate(**options)
    assert generated.shape == (1, 7)
    if wrapped:
        assert torch.equal(model.get_base_model().generate(**options), generated)

    save_adapter(model, tmp_path / "adapter")
    assert read_adapter(tmp_path / "adapter").base.name == str(base)
    # The LoRA is not in the adapter's folder: after loading, it is applied to the model again.
    again = load(tmp_path / "adapter")
    peft.inject_adapter_in_model(config, again)
    stir(again)
    torch.testing.assert_close(logits(again), changed)

    detach(model)
    assert torch.equal(logits(model), tuned)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == trained


def test_a_lora_attached_after_the_memory_survives_detach(tmp_path):
    model = tiny_model()
    bare = logits(model)
    attach(model, DeltaMemConfig(rank=4))
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["q_proj"]), model)
    stir(model)
    assert not torch.equal(logits(model), bare)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    detach(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_peft_prompt_tuning_raises():
    config = peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    with pytest.raises(ArchitectureError, match="PREFIX_TUNING"):
        attach(peft.get_peft_model(tiny_model(), config))


def test_a_peft_adapter_folder_as_base_raises(tmp_path):
    peft.get_peft_model(tiny_model(), peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(
        tmp_path / "lora"
    )
    with pytest.raises(ArchitectureError, match="is a PEFT adapter"):
        create_adapter(str(tmp_path / "lora"), CONFIG, tmp_path / "out")
    assert not (tmp_path / "out").exists()

"""An adapter cast to another dtype is used, trained, saved, loaded and exported with its rounded weights."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.model_runs import CUT_TOLERANCE, close, close_memory, run
from helpers.tiny import patched_model, randomise, save_checkpoint, tokens
from memory.option_sets import OPTIONS, every_option
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from deltamem_tool import DeltaMemConfig, MemoryCache, attach, load, save_adapter
from deltamem_tool.adapter.config_file import WEIGHTS_FILE
from deltamem_tool.adapter.folder import read_adapter
from deltamem_tool.errors import AdapterError
from deltamem_tool.memory.attach import adapter_of
from deltamem_tool.onnx.export.export import export_onnx

all_types = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)


@torch.no_grad()
def rounded(adapter, dtype):
    """Round the weights to `dtype`, and keep them in float32."""
    for weight in adapter.parameters():
        weight.copy_(weight.to(dtype).float())


def saved_model(tmp_path):
    """A model on disk with an adapter whose weights are not representable in half precision."""
    model = AutoModelForCausalLM.from_pretrained(save_checkpoint(tmp_path / "base"))
    randomise(attach(model, DeltaMemConfig(rank=4)))
    return model


@every_option
@all_types
def test_a_cast_adapter_computes_with_rounded_weights(dtype, options):
    expected, model, ids = patched_model(**options), patched_model(**options), tokens(2, 8)
    rounded(adapter_of(expected), dtype)
    before = adapter_of(model).fingerprint
    adapter_of(model).to(dtype)
    (logits, cache), (other, other_cache) = (run(each, ids, (5, 7)) for each in (model, expected))
    close(logits, other, CUT_TOLERANCE)
    close_memory(cache.memory, other_cache.memory)
    assert cache.memory.adapter == other_cache.memory.adapter
    assert (cache.memory.adapter == before) == (dtype == torch.float64)


@all_types
def test_casting_to_half_and_back_changes_the_fingerprint(dtype):
    adapter, expected = (adapter_of(patched_model()) for _ in range(2))
    before = adapter.fingerprint
    adapter.to(dtype).float()
    rounded(expected, dtype)
    assert adapter.fingerprint == expected.fingerprint
    assert (adapter.fingerprint == before) == (dtype == torch.float64)


@every_option
@all_types
def test_a_cast_adapter_gets_gradients(dtype, options):
    model, ids = patched_model(**options), tokens(2, 6)
    adapter_of(model).to(dtype)
    cache = MemoryCache(model)
    cache.segment_tags = torch.tensor([[1, 1, 2, 1, 1, 2]] * 2, dtype=torch.int8) if "granularity" in options else None
    model(ids, labels=ids, cache=cache).loss.backward()
    gradients = [weight.grad for weight in adapter_of(model).parameters() if weight.grad is not None]
    assert gradients and all(gradient.dtype == dtype and gradient.isfinite().all() for gradient in gradients)


@all_types
def test_a_cast_adapter_survives_save_and_load(dtype, tmp_path):
    model = saved_model(tmp_path)
    adapter_of(model).to(dtype)
    save_adapter(model, tmp_path / "adapter")
    loaded = load(tmp_path / "adapter")
    assert torch.equal(run(loaded, tokens(2, 6))[0], run(model, tokens(2, 6))[0])
    assert adapter_of(loaded).fingerprint == adapter_of(model).fingerprint
    assert all(weight.dtype == torch.float32 for weight in adapter_of(loaded).parameters())
    assert adapter_of(model).layer(0).key.weight.dtype == dtype, "saving changed the adapter"


@all_types
def test_a_half_precision_file_is_read(dtype, tmp_path):
    """Version 0.1.0 wrote such files."""
    model = saved_model(tmp_path)
    save_adapter(model, tmp_path / "adapter")
    file = tmp_path / "adapter" / WEIGHTS_FILE
    save_file({name: weight.to(dtype) for name, weight in load_file(file).items()}, file)
    rounded(adapter_of(model), dtype)
    assert torch.equal(run(load(tmp_path / "adapter"), tokens(2, 6))[0], run(model, tokens(2, 6))[0])
    assert read_adapter(tmp_path / "adapter").fingerprint == adapter_of(model).fingerprint


@pytest.mark.parametrize("number", [1e300, math.nan])
def test_numbers_beyond_float32_raise(number, tmp_path):
    model = saved_model(tmp_path)
    save_adapter(model, tmp_path / "adapter")
    file = tmp_path / "adapter" / WEIGHTS_FILE
    weights = load_file(file) | {"layers.0.gate.bias": torch.full((4,), number, dtype=torch.float64)}
    save_file(weights, file)
    with pytest.raises(AdapterError, match=r"gate\.bias contains NaN or infinity"):
        load(tmp_path / "adapter")
    with torch.no_grad():
        adapter_of(model).double().layer(0).gate.bias[1] = number
    with pytest.raises(AdapterError, match="contains NaN or infinity"):
        save_adapter(model, tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
@pytest.mark.parametrize("options", [OPTIONS["extras"], OPTIONS["message"]], ids=["extras", "message"])
def test_a_cast_adapter_can_be_exported(options, tokenizer, tmp_path):
    model = patched_model(**options)
    adapter_of(model).half()
    manifest = export_onnx(model, tokenizer, tmp_path / "out", quantize="int8")
    assert manifest.adapter == adapter_of(model).fingerprint
    assert adapter_of(model).layer(0).key.weight.dtype == torch.float16


def test_weights_loaded_with_assign_are_used():
    adapter, other = adapter_of(patched_model()), adapter_of(patched_model(seed=1))
    before = adapter.fingerprint
    adapter.load_state_dict(other.state_dict(), assign=True)
    assert adapter.fingerprint == other.fingerprint != before

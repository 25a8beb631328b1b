"""`torch.set_default_dtype` changes no result."""

from __future__ import annotations

import pytest
import torch
from helpers.model_runs import run
from helpers.tiny import patched_model, tiny_model, tokens
from memory.option_sets import OPTIONS, every_option

from deltamem_tool import DeltaMemConfig, attach, load, save_adapter
from deltamem_tool.memory.attach import adapter_of
from deltamem_tool.onnx.export.fused_memory import Constants, FusedMemory
from deltamem_tool.training.validation import outcomes


@pytest.fixture(params=[torch.bfloat16, torch.float16, torch.float64], ids=str)
def default_dtype(request):
    yield request.param
    torch.set_default_dtype(torch.float32)


@every_option
@torch.no_grad()
def test_the_default_dtype_does_not_change_a_call(default_dtype, options):
    model, ids = patched_model(**options), tokens(2, 6)
    expected, cache = run(model, ids, (4,))
    torch.set_default_dtype(default_dtype)
    logits, other = run(model, ids, (4,))
    assert torch.equal(logits, expected)
    assert all(torch.equal(other.memory.layers[layer], state) for layer, state in cache.memory.layers.items())


@torch.no_grad()
def test_a_new_adapter_is_float32_whatever_the_default(default_dtype, tmp_path):
    model, ids = tiny_model(), tokens(1, 6)
    expected = model(ids).logits
    torch.set_default_dtype(default_dtype)
    adapter = attach(model, DeltaMemConfig(rank=4, delta_init="base_slice", couple_lambda=False))
    assert all(weight.dtype == torch.float32 for weight in adapter.parameters())
    assert (model(ids).logits - expected).abs().max() > 0
    model.save_pretrained(tmp_path / "base")
    model.config.name_or_path = str(tmp_path / "base")
    save_adapter(model, tmp_path / "adapter")
    assert adapter_of(load(tmp_path / "adapter", base=str(tmp_path / "base"))).fingerprint == adapter.fingerprint


@pytest.mark.parametrize("options", [OPTIONS["token"], OPTIONS["extras"]])
def test_the_default_dtype_does_not_change_exported_weights(default_dtype, options):
    layer = adapter_of(patched_model(**options)).layer(0)
    expected = FusedMemory(layer, Constants(layer.config)).state_dict()
    torch.set_default_dtype(default_dtype)
    for name, weight in FusedMemory(layer, Constants(layer.config)).state_dict().items():
        assert weight.dtype == torch.float32 and torch.equal(weight, expected[name]), name


class _Validated:
    """A step model that is certain of every answer."""

    conditions = ("",)

    def views(self, batch):
        yield "", torch.nn.functional.one_hot(batch["targets"], 5) * 20.0


def test_the_default_dtype_does_not_round_validation_counts(default_dtype):
    count = 300  # bfloat16 counts only to 256
    batch = {"scored": torch.arange(count) * 4, "labels": torch.zeros(count, 4), "targets": torch.arange(count) % 5}
    torch.set_default_dtype(default_dtype)
    assert outcomes(_Validated(), [batch] * 11)[""].tolist()[1:] == [11 * count] * 3

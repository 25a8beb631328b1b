"""An adapter folder is read strictly: errors name what does not fit or is damaged."""

from __future__ import annotations

import json

import pytest
import torch
from adapter.folders import change_config, change_weights

from deltamem_tool import DeltaMemConfig, load
from deltamem_tool.adapter.config_file import CONFIG_FILE, FORMAT_VERSION, WEIGHTS_FILE
from deltamem_tool.adapter.folder import read_adapter
from deltamem_tool.errors import AdapterError


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
            lambda t: t | {"layers.0.gate.bias": torch.zeros(4).int(), "more": torch.zeros(1)},
            ["layers.0.gate.bias is I32, not float32", "extra more"],
        ),
    ],
    ids=["missing", "extra", "misshapen", "dtype"],
)
def test_invalid_tensors_are_named(adapter, change, says):
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
        (lambda t: t | {"layers.0.gate.bias": torch.zeros(4).int()}, "I32, not float32"),
        (lambda t: {"more": torch.zeros(1)}, "it has no layer"),
    ],
)
def test_an_adapter_is_read_strictly_without_its_base(adapter, change, says):
    assert read_adapter(adapter).layer_indices == [0, 1] and read_adapter(adapter).memory_bytes == 2 * 4 * 4 * 4
    change_weights(adapter, change)
    with pytest.raises(AdapterError, match="does not fit") as refusal:
        read_adapter(adapter)
    assert says in str(refusal.value)


def test_tensors_of_layers_missing_in_the_config_raise(adapter):
    change_config(adapter, mechanism=DeltaMemConfig(rank=4, layers=(1,)).to_dict())
    with pytest.raises(AdapterError, match=r"extra layers.0.key.weight"):
        read_adapter(adapter)


def test_weights_with_nan_raise(adapter):
    change_weights(adapter, lambda t: t | {"layers.0.gate.bias": torch.full((4,), torch.nan)})
    with pytest.raises(AdapterError, match=r"layers.0.gate.bias.*NaN"):
        load(adapter)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "not JSON"),
        ('{"format": "deltamem-adapter", ', "not JSON"),
        ("[]", "not an adapter folder"),
        ('"deltamem-adapter"', "not an adapter folder"),
        ("{}", "not an adapter folder"),
        ('{"format": "peft", "format_version": 1}', "not an adapter folder"),
        ('{"format": "deltamem-adapter", "format_version": true}', "not an adapter folder"),
        ('{"format": "deltamem-adapter", "format_version": 1}', "damaged"),
        ('{"format": "deltamem-adapter", "format_version": 1, "mechanism": [1], "base": {}}', "damaged"),
        ('{"format": "deltamem-adapter", "format_version": 1, "mechanism": {"rank": 4}, "base": {}}', "damaged"),
        ('{"format": "deltamem-adapter", "format_version": 1, "mechanism": {"layers": 3}, "base": {}}', "damaged"),
        ('{"format": "deltamem-adapter", "format_version": 1, "mechanism": {"ranks": 4}, "base": {}}', "ranks"),
        (b"\xff\xfe", "not JSON"),
    ],
)
def test_damaged_configs_raise(adapter, content, says):
    (adapter / CONFIG_FILE).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(AdapterError, match=says):
        read_adapter(adapter)


def test_invalid_types_in_the_base_entry_raise(adapter):
    for wrong in ({"name": 3}, {"fingerprint": None}, {"model_type": []}):
        config = json.loads((adapter / CONFIG_FILE).read_text())
        change_config(adapter, base={**config["base"], **wrong})
        with pytest.raises(AdapterError, match="damaged"):
            read_adapter(adapter)
        change_config(adapter, base=config["base"])


def test_a_newer_format_raises(adapter):
    change_config(adapter, format_version=FORMAT_VERSION + 1)
    with pytest.raises(AdapterError, match=r"(?s)of adapter format 2.*Update deltamem-tool"):
        load(adapter)


def test_truncated_weights_raise(adapter):
    whole = (adapter / WEIGHTS_FILE).read_bytes()
    for length in (0, 5, 200, len(whole) - 1):
        (adapter / WEIGHTS_FILE).write_bytes(whole[:length])
        with pytest.raises(AdapterError, match="damaged"):
            read_adapter(adapter)
    for file in (WEIGHTS_FILE, CONFIG_FILE):
        (adapter / file).unlink()
        with pytest.raises(AdapterError, match=f"no {file}"):
            read_adapter(adapter)

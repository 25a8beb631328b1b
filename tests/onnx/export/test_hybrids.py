"""Inputs and outputs of the graph of a hybrid model, and their description in the manifest."""

from __future__ import annotations

import dataclasses
import json

import pytest
from helpers.hybrids import hybrid
from helpers.tiny import tiny_tokenizer

from deltamem_tool.errors import ExportError
from deltamem_tool.memory.attach import adapter_of
from deltamem_tool.memory.call_options import CallOptions
from deltamem_tool.onnx.contract import Interface, Layer
from deltamem_tool.onnx.export.export import export_onnx
from deltamem_tool.onnx.export.interface import interface_of
from deltamem_tool.onnx.export.targets import target_of
from deltamem_tool.onnx.manifest import Manifest
from deltamem_tool.onnx.signature_table import rows


def interface(name: str) -> Interface:
    model = hybrid(name, tiny_tokenizer())
    options = CallOptions(model, "last")
    return interface_of(model, adapter_of(model), options, "last", target_of("cpu", "float32", "none"))


@pytest.mark.parametrize(
    ("name", "layer", "base", "memory"),
    [
        ("lfm2", 0, {"conv_state"}, False),
        ("lfm2", 1, set(), True),
        ("qwen3_5_text", 0, {"conv_state", "recurrent_state"}, False),
        ("falcon_h1", 0, {"conv_state", "ssm_state"}, True),  # all in one layer
    ],
)
def test_every_state_belongs_to_the_memory_or_the_base(name, layer, base, memory):
    described = interface(name).layers[layer]
    assert described.base_states.keys() == base and (described.state is not None) == memory


def test_states_of_the_base_are_not_counted_as_memory():
    hybrid_interface = interface("falcon_h1")
    inputs, own = hybrid_interface.inputs(), hybrid_interface.base_states
    assert own.keys() <= inputs.keys() and all(inputs[name][0] == "float32" for name in own)
    assert hybrid_interface.memory_bytes == sum(4 * 2 * 4 * 4 for layer in hybrid_interface.layers if layer.state)
    meanings = {row.name.rpartition(".")[2]: row.meaning for row in rows(hybrid_interface) if row.kind == "input"}
    assert "memory" in meanings["recurrent_state"]
    assert "base" in meanings["ssm_state"] and "convolution" in meanings["conv_state"]


def test_layers_with_base_states_are_described_separately():
    """Layers of linear attention and layers with a memory are in one table under one name."""
    of_states = {row.meaning for row in rows(interface("qwen3_5_text")) if row.name.endswith("recurrent_state")}
    assert {"memory" in meaning for meaning in of_states} == {True, False}


def manifest(layers: tuple[Layer, ...]) -> dict:
    described = dataclasses.replace(interface("lfm2"), layers=layers)
    whole = Manifest("a", {}, None, "lfm2", "cpu", "none", None, described, 0.0, None, {})
    return json.loads(whole.to_json())


LAYERS = (
    Layer((2, 8), (2, 8), (1, 4, 4)),
    Layer(None, None, None, ((32, 2), (16, 3)), (4, 8, 8)),
    Layer(None, None, None, (), (64, 8)),
    Layer((1, 8), (1, 8), None, columns=(("compressor_kv", 16), ("compressor_gate", 16))),
    Layer(None, None, None, ((32, 3),), (4, 8, 8), ngrams=(64, 9, 2)),
)


def test_a_manifest_records_which_states_belong_to_the_base():
    content = manifest(LAYERS)
    assert Manifest.from_json(json.dumps(content)).interface.layers == LAYERS
    for layer in content["interface"]["layers"]:  # as in earlier folders
        del layer["convolutions"], layer["recurrent"], layer["columns"], layer["ngrams"]
    older = Manifest.from_json(json.dumps(content)).interface.layers
    assert older[0] == LAYERS[0] and not older[1].base_states


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("convolutions", None),
        ("convolutions", [[32]]),
        ("convolutions", [[32, 2.5]]),
        ("convolutions", [None]),
        ("convolutions", [[32, 2]] * 9),
        ("recurrent", []),
        ("recurrent", [4, 0, 8]),
        ("recurrent", [4, 8, 8, 8]),
        ("recurrent", "4"),
        ("recurrent", [2**40]),
        ("ngrams", [64, 9]),
        ("ngrams", [64, 9, 0]),
        ("columns", None),
        ("columns", ["indexer_key"]),
        ("columns", [["key", 8]]),
        ("columns", [["indexer_key", 0]]),
        ("columns", [["indexer_key", 8, 8]]),
    ],
)
def test_invalid_states_in_a_manifest_raise(field, value):
    content = manifest(LAYERS)
    content["interface"]["layers"][1][field] = value
    with pytest.raises(ExportError, match=rf"layers\.{field}"):
        Manifest.from_json(json.dumps(content))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lfm2", "qwen3_5_text"])
def test_a_float16_hybrid_is_exported_with_float32_states(name, tmp_path):
    """The base's states are float32 nevertheless. The export itself has compared the results."""
    tokenizer = tiny_tokenizer()
    manifest = export_onnx(hybrid(name, tokenizer).half(), tokenizer, tmp_path / "onnx")
    assert manifest.interface.dtype == "float16" and manifest.max_abs_diff is not None

"""The exported graph compared with PyTorch, call by call."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from tokenizers import Tokenizer

from deltamem_tool.cli.export import command
from deltamem_tool.errors import DeltaMemError, ExportError
from deltamem_tool.memory.attach import adapter_of
from deltamem_tool.memory.cache import MemoryCache
from deltamem_tool.onnx import contract
from deltamem_tool.onnx.export import export
from deltamem_tool.onnx.manifest import Manifest
from deltamem_tool.onnx.runtime.engine import OnnxModel

TOLERANCE = 1e-4


def described(values) -> dict[str, tuple[str, list]]:
    return {value.name: (value.type, value.shape) for value in values}


def test_inputs_and_outputs_match_the_contract(qwen3):
    session = onnxruntime.InferenceSession(qwen3.folder / "model.onnx", providers=["CPUExecutionProvider"])
    kv, state = (
        ("tensor(float)", ["batch_size", 2, "past_sequence_length", 16]),
        ("tensor(float)", ["batch_size", 2, 4, 4]),
    )
    assert described(session.get_inputs()) == {
        "input_ids": ("tensor(int64)", ["batch_size", "sequence_length"]),
        "attention_mask": ("tensor(int64)", ["batch_size", "total_sequence_length"]),
        "write_mask": ("tensor(bool)", ["batch_size", "sequence_length"]),
        "past_key_values.0.key": kv,
        "past_key_values.0.value": kv,
        "past_key_values.0.recurrent_state": state,
        "past_key_values.1.key": kv,
        "past_key_values.1.value": kv,
        "past_key_values.1.recurrent_state": state,
    }
    kv = ("tensor(float)", ["batch_size", 2, "total_sequence_length", 16])
    assert described(session.get_outputs()) == {
        "logits": ("tensor(float)", ["batch_size", 1, 259]),
        "present.0.key": kv,
        "present.0.value": kv,
        "present.0.recurrent_state": state,
        "present.1.key": kv,
        "present.1.value": kv,
        "present.1.recurrent_state": state,
    }


def test_a_layer_without_a_memory_has_no_state(llama):
    session = onnxruntime.InferenceSession(llama.folder / "model.onnx", providers=["CPUExecutionProvider"])
    assert [name for name in described(session.get_inputs()) if name.endswith("state")] == [
        "past_key_values.1.recurrent_state"
    ]
    assert described(session.get_outputs())["logits"] == ("tensor(float)", ["batch_size", "sequence_length", 259])


def test_the_recurrence_is_one_operator_per_layer(qwen3):
    operators = [(node.domain, node.op_type) for node in onnx.load(qwen3.folder / "model.onnx").graph.node]
    assert operators.count(("com.microsoft", "LinearAttention")) == 2
    assert not {"Loop", "Scan"} & {name for _, name in operators}


def test_adapter_weights_are_in_the_weights_file(qwen3):
    """If they were constants in the graph, two adapters on one base would need two whole graphs."""
    graph = onnx.load(qwen3.folder / "model.onnx").graph
    initializers = [onnx.numpy_helper.to_array(tensor).ravel() for tensor in graph.initializer if tensor.dims]
    bias = adapter_of(qwen3.model).layers["0"].gate.bias.detach().numpy()
    assert any(holds(numbers, bias) for numbers in initializers)


def holds(numbers: np.ndarray, part: np.ndarray) -> bool:
    """Whether `numbers` contains `part` as consecutive values."""
    starts = np.flatnonzero(numbers[: len(numbers) - len(part) + 1] == part[0]) if len(numbers) >= len(part) else []
    return any(np.array_equal(numbers[start : start + len(part)], part) for start in starts)


def test_the_folder_holds_the_expected_files(qwen3):
    assert {file.name for file in qwen3.folder.iterdir()} >= {
        "model.onnx",
        "model.onnx.data",
        "deltamem_onnx.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
    }
    assert list(qwen3.folder.parent.iterdir()) == [qwen3.folder]  # no staging folder is left
    for file in qwen3.folder.iterdir():
        for path in (b"/site-packages/", str(qwen3.folder.parent).encode()):
            assert path not in file.read_bytes()


def test_the_manifest_describes_the_export(qwen3):
    manifest = qwen3.manifest
    assert manifest == Manifest.from_json((qwen3.folder / "deltamem_onnx.json").read_text())
    assert (manifest.base_model, manifest.model_type) == ("someone/tiny-qwen3", "qwen3")
    assert manifest.adapter == adapter_of(qwen3.model).fingerprint
    assert manifest.interface.state_shapes == {0: (2, 4, 4), 1: (2, 4, 4)}
    assert 0 < manifest.max_abs_diff < TOLERANCE


# (tokens, padding of rows 0 to 2 with its side, writes)
CALLS = (
    (9, (0, 3, 5), "left", True),
    (7, (0, 1, 2), "right", True),
    (1, (0, 0, 0), "left", True),
    (4, (0, 2, 1), "left", False),
    (1, (0, 0, 0), "left", False),
    (80, (0, 30, 79), "left", True),
    (1, (0, 0, 0), "left", True),
)


def test_a_padded_batch_over_many_calls_matches_pytorch(exported):
    """Every row equals the same row alone, without padding, in PyTorch."""
    runtime = OnnxModel(exported.folder)
    random = np.random.default_rng(1)
    past = runtime.graph.empty_past(3)
    caches = [MemoryCache(exported.model) for _ in range(3)]
    mask = np.zeros((3, 0), np.int64)
    for tokens, padding, side, write in CALLS:
        ids = random.integers(0, 256, (3, tokens))
        valid = np.ones((3, tokens), bool)
        for row, count in enumerate(padding):
            valid[row, slice(0, count) if side == "left" else slice(tokens - count, tokens)] = False
        mask = np.concatenate([mask, valid.astype(np.int64)], axis=1)
        logits, past = runtime.graph.step(ids, mask, np.full((3, tokens), write), past)
        for row, cache in enumerate(caches):
            cache.write = write
            alone = torch.from_numpy(ids[row : row + 1, valid[row]])
            with torch.no_grad():
                expected = exported.model(alone, cache=cache).logits[0]
            actual = torch.from_numpy(logits[row])
            if exported.manifest.interface.logits == "all":
                torch.testing.assert_close(actual[valid[row]], expected, rtol=0, atol=TOLERANCE)
            elif valid[row, -1]:
                torch.testing.assert_close(actual[-1], expected[-1], rtol=0, atol=TOLERANCE)
            for layer, state in runtime.graph.states(past).items():
                expected_state = cache.memory.layers[layer][0]
                torch.testing.assert_close(torch.from_numpy(state[row]), expected_state, rtol=0, atol=TOLERANCE)


def test_the_write_mask_applies_per_token(qwen3):
    runtime = OnnxModel(qwen3.folder)
    ids, mask = np.arange(6)[None] + 65, np.ones((1, 6), np.int64)
    write = np.array([[True, False, True, True, False, False]])
    _, past = runtime.graph.step(ids, mask, write, runtime.graph.empty_past(1))
    cache = MemoryCache(qwen3.model, write=torch.from_numpy(write))
    with torch.no_grad():
        qwen3.model(torch.from_numpy(ids), cache=cache)
    for layer, state in runtime.graph.states(past).items():
        torch.testing.assert_close(torch.from_numpy(state), cache.memory.layers[layer], rtol=0, atol=TOLERANCE)
    _, unwritten = runtime.graph.step(ids, mask, np.zeros((1, 6), bool), runtime.graph.empty_past(1))
    assert all(not state.any() for state in runtime.graph.states(unwritten).values())


def test_the_memory_changes_the_logits(qwen3):
    """Otherwise, the comparisons above would compare two base models."""
    runtime = OnnxModel(qwen3.folder)
    ids, mask, write = np.full((1, 1), 65), np.ones((1, 1), np.int64), np.ones((1, 1), bool)
    states = {i: np.ones((1, 2, 4, 4), np.float32) for i in (0, 1)}
    with_memory, _ = runtime.graph.step(ids, mask, write, runtime.graph.empty_past(1, states))
    without, _ = runtime.graph.step(ids, mask, write, runtime.graph.empty_past(1))
    assert np.abs(with_memory - without).max() > 0.1


def test_a_wrong_graph_raises_and_leaves_nothing(qwen3, no_tracing, tmp_path):
    delta = adapter_of(qwen3.model).layers["1"].delta["o"].weight
    saved = delta.detach().clone()
    with torch.no_grad():
        delta.add_(0.1)  # the model is no longer the one that was exported
    try:
        with pytest.raises(ExportError, match="does not compute what PyTorch computes"):
            export.export_onnx(qwen3.model, qwen3.tokenizer, tmp_path / "out")
    finally:
        with torch.no_grad():
            delta.copy_(saved)
    assert list(tmp_path.iterdir()) == []


def test_the_exported_tokenizer_does_not_truncate_or_pad(qwen3, no_tracing, tmp_path):
    tokenizer = copy.deepcopy(qwen3.tokenizer)
    backend = tokenizer.backend_tokenizer
    backend.enable_truncation(8)
    backend.enable_padding(length=64)
    export.export_onnx(qwen3.model, tokenizer, tmp_path / "out", logits="last")
    written = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert written.truncation is None and written.padding is None
    assert backend.truncation["max_length"] == 8 and backend.padding["length"] == 64  # the caller's own folder is kept


def test_ctrl_c_is_not_reported_as_a_failed_trace(qwen3, monkeypatch, tmp_path):
    def interrupted(*_):
        try:
            raise KeyboardInterrupt
        finally:
            raise AssertionError("Trying to pop empty mode stack")

    monkeypatch.setattr("deltamem_tool.onnx.export.trace._graph_of", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export.export_onnx(qwen3.model, qwen3.tokenizer, tmp_path / "onnx")
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_kept_unless_overwriting(qwen3, no_tracing, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("mine")
    with pytest.raises(DeltaMemError, match="already exists"):
        export.export_onnx(qwen3.model, qwen3.tokenizer, out)
    assert [file.name for file in out.iterdir()] == ["mine"]
    export.export_onnx(qwen3.model, qwen3.tokenizer, out, overwrite=True)
    assert (out / "model.onnx").is_file() and not (out / "mine").exists()


def test_options_that_a_target_does_not_support_raise(qwen3, monkeypatch, tmp_path):
    with pytest.raises(ExportError, match="no target 'gpu'"):
        export.export_onnx(qwen3.model, qwen3.tokenizer, tmp_path / "out", target="gpu")
    monkeypatch.setattr(type(qwen3.model), "dtype", torch.bfloat16)
    with pytest.raises(ExportError, match="cpu does not support models of bfloat16"):
        export.export_onnx(qwen3.model, qwen3.tokenizer, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def manifest_with(manifest: Manifest, **changes) -> str:
    return json.dumps({**json.loads(manifest.to_json()), **changes})


INTERFACE = {"logits": "last", "vocab_size": 259, "dtype": "float32", "segment": 0, "layers": [{}]}
INTERFACE |= {"genai": False, "max_length": 0}


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"format": "other"}, "format"),
        ({"format_version": 99}, "format 99"),
        ({"adapter": ""}, "adapter"),
        ({"max_abs_diff": "small"}, "max_abs_diff"),
        ({"interface": INTERFACE | {"layers": []}}, "layers"),
        ({"interface": INTERFACE | {"logits": "some"}}, "logits"),
        ({"interface": INTERFACE | {"dtype": "int3"}}, "dtype"),
        ({"interface": INTERFACE | {"segment": -1}}, "segment"),
        ({"interface": INTERFACE | {"genai": 1}}, "genai"),
    ],
)
def test_an_invalid_manifest_raises(qwen3, changes, why):
    with pytest.raises(ExportError, match=why):
        Manifest.from_json(manifest_with(qwen3.manifest, **changes))


def test_fields_of_a_later_release_are_ignored(qwen3):
    content = json.loads(qwen3.manifest.to_json())
    content["surprise"] = content["interface"]["surprise"] = content["interface"]["layers"][0]["surprise"] = 1
    assert Manifest.from_json(json.dumps(content)) == qwen3.manifest


def test_a_manifest_without_a_required_field_raises(qwen3):
    content = json.loads(qwen3.manifest.to_json())
    del content["mechanism"]
    with pytest.raises(ExportError, match="mechanism"):
        Manifest.from_json(json.dumps(content))
    with pytest.raises(ExportError, match="JSON"):
        Manifest.from_json("{")


def test_a_manifest_of_another_graph_raises(qwen3, llama, tmp_path):
    folder = shutil.copytree(qwen3.folder, tmp_path / "mixed")
    shutil.copy(llama.folder / contract.MANIFEST_FILE, folder)
    with pytest.raises(ExportError, match="does not match the graph or this version"):
        OnnxModel(folder)
    interface = dataclasses.replace(qwen3.manifest.interface, vocab_size=7)
    manifest = dataclasses.replace(qwen3.manifest, interface=interface)
    (folder / contract.MANIFEST_FILE).write_text(manifest.to_json())
    with pytest.raises(ExportError, match="logits"):
        OnnxModel(folder)


@pytest.mark.parametrize(
    ("target", "packed", "messages"), [("cpu", True, False), ("cpu", False, True), ("portable", False, False)]
)
def test_exporting_without_fused_attention_reports_it(qwen3, monkeypatch, tmp_path, target, packed, messages):
    interface = dataclasses.replace(qwen3.manifest.interface, packed=packed)
    manifest = dataclasses.replace(qwen3.manifest, interface=interface)
    monkeypatch.setattr("deltamem_tool.adapter.load.load", lambda *args, **options: qwen3.model)
    monkeypatch.setattr("deltamem_tool.base_model.tokenizer.tokenizer_of", lambda *args, **options: qwen3.tokenizer)
    monkeypatch.setattr(export, "export_onnx", lambda *args, **options: manifest)
    out = CliRunner().invoke(command, ["adapter", "--base", "base", "--target", target, "--out", str(tmp_path / "out")])
    assert out.exit_code == 0, out.output
    assert ("is not ONNX Runtime's operator" in out.output) == messages

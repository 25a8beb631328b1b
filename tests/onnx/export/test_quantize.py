"""Quantising the base's weights: what they become, and that the memory's stay what they were."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from deltamem_tool.errors import ExportError
from deltamem_tool.memory.attach import adapter_of
from deltamem_tool.onnx.contract import Manifest
from deltamem_tool.onnx.export import export
from deltamem_tool.onnx.export.fused_memory import fused_memories
from deltamem_tool.onnx.export.quantize import memory_weights, quantize_graph
from deltamem_tool.onnx.export.quantized_products import ACCURACY_LEVEL, BLOCK_SIZE
from deltamem_tool.onnx.export.rewrites import JOIN_WEIGHTS
from deltamem_tool.onnx.export.targets import INT4, INT8, TARGETS, target_of
from deltamem_tool.onnx.runtime.engine import OnnxModel

WIDE, VOCABULARY = 64, 80
INT8_LEVELS, INT4_LEVELS = 63, 15  # steps from zero to the largest weight (7 bits), and over a block's range
ROUNDING = 1e-5  # of float32, beside the half step that a quantised weight may be off


@pytest.fixture
def weights() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    sizes = {"base": (WIDE, 48), "memory": (WIDE, 16), "gemm": (32, WIDE), "bias": (32,), "head": (WIDE, VOCABULARY)}
    return {name: random.normal(size=size).astype(np.float32) for name, size in sizes.items()}


def write_graph(folder: Path, weights: dict[str, np.ndarray], operators: str = "base memory gemm head") -> None:
    """x `[B, WIDE]` to its product with each weight; "gemm" is transposed and has a bias."""
    nodes, outputs = [], []
    for name in operators.split():
        columns = weights[name].shape[1] if name != "gemm" else len(weights[name])
        outputs.append(helper.make_tensor_value_info(f"{name}_out", TensorProto.FLOAT, ["B", columns]))
        if name == "gemm":
            nodes.append(helper.make_node("Gemm", ["x", "gemm", "bias"], ["gemm_out"], name="gemm_node", transB=1))
        else:
            nodes.append(helper.make_node("MatMul", ["x", name], [f"{name}_out"], name=f"{name}_node"))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", WIDE])
    used = {name for node in nodes for name in node.input} - {"x"}
    initializers = [numpy_helper.from_array(weights[name], name) for name in sorted(used)]
    graph = helper.make_graph(nodes, "products", [x], outputs, initializers)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.save(model, folder / "model.onnx", save_as_external_data=True, location="model.onnx.data", size_threshold=0)


def run(folder: Path, x: np.ndarray) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {"x": x}), strict=True))


def half_steps(weight: np.ndarray, how: str) -> np.ndarray:
    """Half of what lies between two values that each entry of `weight` `[in, out]` can take, its share of rounding."""
    if how == INT8:
        return np.broadcast_to(np.abs(weight).max(axis=0) / INT8_LEVELS / 2, weight.shape)
    blocks = weight.reshape(-1, BLOCK_SIZE, weight.shape[1])
    low, high = np.minimum(blocks.min(axis=1), 0), np.maximum(blocks.max(axis=1), 0)
    # The block's zero is rounded to a step too: a value at its end may be off by a whole one.
    return np.repeat((high - low) / INT4_LEVELS, BLOCK_SIZE, axis=0)


@pytest.mark.parametrize("how", [INT8, INT4])
def test_every_weight_is_within_its_step_and_the_memory_is_untouched(how, weights, tmp_path):
    write_graph(tmp_path, weights)
    identity = np.eye(WIDE, dtype=np.float32)  # its product with a weight is the weight
    before = run(tmp_path, identity)
    assert quantize_graph(tmp_path, how, [weights["memory"]], VOCABULARY) == 2
    after = run(tmp_path, identity)
    for name in ("memory_out", "head_out"):
        np.testing.assert_array_equal(after[name], before[name])
    for name, weight in (("base_out", weights["base"]), ("gemm_out", weights["gemm"].T)):
        off = np.abs(after[name] - before[name])
        assert (off <= half_steps(weight, how) + ROUNDING).all()
        assert off.max() > ROUNDING  # it was quantised
    assert {file.name for file in tmp_path.iterdir()} == {"model.onnx", "model.onnx.data"}
    tensors = {tensor.name: tensor for tensor in onnx.load(tmp_path / "model.onnx").graph.initializer}
    np.testing.assert_array_equal(numpy_helper.to_array(tensors["memory"]), weights["memory"])
    assert not {"base", "gemm"} & tensors.keys()
    nodes = [node for node in onnx.load(tmp_path / "model.onnx").graph.node if node.op_type == "MatMulNBits"]
    levels = [attribute.i for node in nodes for attribute in node.attribute if attribute.name == "accuracy_level"]
    assert levels == ([ACCURACY_LEVEL] * 2 if how == INT4 else [])


@pytest.mark.parametrize("rows", [16, 40, 96])
def test_blocks_that_are_not_full_or_not_even_in_number(rows, tmp_path):
    """Half a block, one and a quarter, three: in ONNX Runtime's kernel."""
    weight = np.random.default_rng(rows).normal(size=(rows, 5)).astype(np.float32)
    weight[:, 0] = 0
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", rows])
    y = helper.make_tensor_value_info("base_out", TensorProto.FLOAT, ["B", 5])
    node = helper.make_node("MatMul", ["x", "base"], ["base_out"])
    graph = helper.make_graph([node], "product", [x], [y], [numpy_helper.from_array(weight, "base")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, tmp_path / "model.onnx", save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    assert quantize_graph(tmp_path, INT4, [], VOCABULARY) == 1
    padded = np.zeros((-(-rows // BLOCK_SIZE) * BLOCK_SIZE, 5), np.float32)
    padded[:rows] = weight
    found = run(tmp_path, np.eye(rows, dtype=np.float32))["base_out"]
    assert (np.abs(found - weight) <= half_steps(padded, INT4)[:rows] + ROUNDING).all()


def test_a_matrix_that_holds_a_part_of_the_memory_stays(weights, tmp_path):
    """Fusions put the weights that read one input side by side."""
    packed = np.concatenate([weights["base"], weights["memory"]], axis=1)
    write_graph(tmp_path, {**weights, "base": packed}, "base gemm")
    x = np.random.default_rng(1).normal(size=(3, WIDE)).astype(np.float32)
    before = run(tmp_path, x)
    assert quantize_graph(tmp_path, INT8, [weights["memory"]], VOCABULARY) == 1
    np.testing.assert_array_equal(run(tmp_path, x)["base_out"], before["base_out"])


def test_what_fusion_has_packed_beside_the_memory_is_quantised(weights, tmp_path):
    """Two of the base's matrices, the memory's between them, in one product that is split: the base's leave it."""
    base, memory = weights["base"], weights["memory"]
    packed, sizes = np.concatenate([base, memory, base], axis=1), np.array([48, 16, 48], np.int64)
    outputs = [helper.make_tensor_value_info(f"o{i}", TensorProto.FLOAT, ["B", int(n)]) for i, n in enumerate(sizes)]
    nodes = [
        helper.make_node("MatMul", ["x", "packed"], ["all"]),
        helper.make_node("Split", ["all", "sizes"], ["a", "b", "c"], axis=-1),
        *(helper.make_node("Identity", [part], [f"o{i}"]) for i, part in enumerate("abc")),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", WIDE])
    initializers = [numpy_helper.from_array(packed, "packed"), numpy_helper.from_array(sizes, "sizes")]
    graph = helper.make_graph(nodes, "packed", [x], outputs, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, tmp_path / "model.onnx", save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    assert quantize_graph(tmp_path, INT8, [memory], VOCABULARY) == 1
    given = np.random.default_rng(1).normal(size=(3, WIDE)).astype(np.float32)
    first, own, last = run(tmp_path, given).values()
    np.testing.assert_allclose(own, given @ memory, atol=1e-4)
    np.testing.assert_array_equal(first, last)
    exact = given @ base
    assert 1e-3 < np.abs(first - exact).max() < 0.1 * np.abs(exact).max()


def test_a_memory_that_cannot_be_told_apart_is_refused(weights, tmp_path):
    write_graph(tmp_path, {**weights, "memory": weights["memory"] * 3})
    files = [(tmp_path / name).read_bytes() for name in ("model.onnx", "model.onnx.data")]
    with pytest.raises(ExportError, match="16 columns"):
        quantize_graph(tmp_path, INT4, [weights["memory"]], VOCABULARY)
    assert [(tmp_path / name).read_bytes() for name in ("model.onnx", "model.onnx.data")] == files


def test_a_graph_with_nothing_to_quantise_is_refused(weights, tmp_path):
    write_graph(tmp_path, weights, "memory head")
    with pytest.raises(ExportError, match="nothing to quantise"):
        quantize_graph(tmp_path, INT8, [weights["memory"]], VOCABULARY)


# What an 8-bit and a 4-bit base of random weights may do to logits and states: root mean squares, of their own. Logits
# that have nothing to do with each other are 1.4 apart.
LARGEST = {INT8: 0.25, INT4: 0.8}


def memory_of(exported) -> list[np.ndarray]:
    """The memory's matrices in the exported graph."""
    adapter = adapter_of(exported.model)
    return memory_weights(adapter, fused_memories(adapter, TARGETS["cpu"], JOIN_WEIGHTS))


@pytest.mark.parametrize("how", [INT8, INT4])
def test_an_exported_model(how, llama, tmp_path):
    folder = shutil.copytree(llama.folder, tmp_path / how)
    memory = memory_of(llama)
    quantize_graph(folder, how, memory, llama.manifest.interface.vocab_size)
    plain, quantized = OnnxModel(llama.folder), OnnxModel(folder)
    ids, mask = np.random.default_rng(2).integers(0, 256, (2, 40)), np.ones((2, 40), np.int64)
    write = np.ones((2, 40), bool)
    logits, past = plain.graph.step(ids, mask, write, plain.graph.empty_past(2))
    found, found_past = quantized.graph.step(ids, mask, write, quantized.graph.empty_past(2))
    states, found_states = plain.graph.states(past), quantized.graph.states(found_past)
    for x, y in ((found, logits), (found_states[1], states[1])):
        assert 1e-3 < np.sqrt(np.mean((x - y) ** 2) / np.mean(y**2)) < LARGEST[how]
    tensors = [numpy_helper.to_array(tensor) for tensor in onnx.load(folder / "model.onnx").graph.initializer]
    columns = {column.tobytes() for x in tensors if x.dtype == np.float32 and x.ndim == 2 for column in x.T}
    assert all(column.tobytes() in columns for weight in memory for column in weight.T)


def test_what_was_lost_is_in_the_manifest(llama, no_tracing_of_llama, tmp_path):
    manifest = export.export_onnx(llama.model, llama.tokenizer, tmp_path / "out", logits="all", quantize=INT8)
    assert manifest == Manifest.from_json((tmp_path / "out" / "deltamem_onnx.json").read_text())
    assert manifest.quantize == INT8
    assert manifest.max_abs_diff > export.TOLERANCE > llama.manifest.max_abs_diff
    assert 0.5 < manifest.greedy_agreement < 1
    assert llama.manifest.greedy_agreement is None


def test_a_wrong_graph_is_refused_before_it_is_quantised(llama, no_tracing_of_llama, monkeypatch, tmp_path):
    monkeypatch.setattr(export, "quantize_graph", lambda *args: pytest.fail("it was quantised"))
    norm = llama.model.model.norm.weight
    saved = norm.detach().clone()
    with torch.no_grad():
        norm.add_(0.1)
    try:
        with pytest.raises(ExportError, match="does not compute what PyTorch computes"):
            export.export_onnx(llama.model, llama.tokenizer, tmp_path / "out", logits="all", quantize=INT4)
    finally:
        with torch.no_grad():
            norm.copy_(saved)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("target", "dtype", "quantize", "why"),
    [
        ("cpu", "bfloat16", "none", "cpu cannot take a model of bfloat16"),
        ("cuda", "float32", "int8", "cuda cannot take the quantisation int8"),
        ("cpu", "float16", "int8", "int8 cannot take a model of float16"),
        ("cpu", "float32", "int3", "cpu cannot take the quantisation int3"),
    ],
)
def test_what_does_not_go_together_is_refused(target, dtype, quantize, why):
    with pytest.raises(ExportError, match=why):
        target_of(target, dtype, quantize)


def test_its_import_leaves_logging_alone():
    """ONNX Runtime's quantiser calls `logging.basicConfig(level=INFO)` when it is imported."""
    code = "import logging, deltamem_tool.onnx.export.quantized_products as _; root = logging.getLogger()\n"
    code += "assert not root.handlers and root.level == logging.WARNING"
    subprocess.run([sys.executable, "-c", code], check=True)

"""Quantisation of the base's weights, which leaves the memory's weights unchanged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from helpers.graph_constants import constants
from onnx import TensorProto, helper, numpy_helper

from deltamem_tool.errors import ExportError
from deltamem_tool.onnx.export.quantize import quantize_graph
from deltamem_tool.onnx.export.quantized_matrices import ACCURACY_LEVEL
from deltamem_tool.onnx.manifest import Quantization

WIDE, VOCABULARY = 96, 80  # three groups of 32
ROUNDING = 1e-5  # for float32, in addition to the largest error of a quantised weight
ACTIVATION_ERROR = 0.02  # relative, of a product whose input is rounded to int8
FLOAT16_ROUNDING = 2**-11  # relative; offsets are stored in float16
INT8_32, INT4_32 = Quantization(8, 32, True), Quantization(4, 32, True)
ASYMMETRIC = Quantization(4, 16, False)


@pytest.fixture
def weights() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    sizes = {"base": (WIDE, 48), "memory": (WIDE, 16), "gemm": (32, WIDE), "bias": (32,), "head": (VOCABULARY, WIDE)}
    return {name: random.normal(size=size).astype(np.float32) for name, size in sizes.items()}


def write_graph(folder: Path, weights: dict[str, np.ndarray], operators: str = "base memory gemm head") -> None:
    """x `[B, WIDE]` to its product with each weight: "gemm" is transposed and has a bias, "head" is transposed.

    "embedding" is a lookup in the weight of that name, or in "head", which it is tied to then.
    """
    nodes, outputs = [], []
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", WIDE])]
    for name in operators.split():
        weight = weights[name if name in weights else "head"]
        out = f"{name}_out"
        if name == "gemm":
            nodes.append(helper.make_node("Gemm", ["x", "gemm", "bias"], [out], transB=1))
        elif name == "head":
            nodes.append(helper.make_node("FusedMatMul", ["x", "head"], [out], domain="com.microsoft", transB=1))
        elif name == "embedding":
            inputs.append(helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["T"]))
            nodes.append(helper.make_node("Gather", [name if name in weights else "head", "input_ids"], [out]))
        else:
            nodes.append(helper.make_node("MatMul", ["x", name], [out]))
        columns = weight.shape[0 if name in ("gemm", "head") else 1]
        outputs.append(helper.make_tensor_value_info(out, TensorProto.FLOAT, ["B", columns]))
    used = {name for node in nodes for name in node.input} - {"x", "input_ids"}
    initializers = [numpy_helper.from_array(weights[name], name) for name in sorted(used)]
    save(folder, helper.make_graph(nodes, "products", inputs, outputs, initializers))


def save(folder: Path, graph: onnx.GraphProto) -> None:
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.save(model, folder / "model.onnx", save_as_external_data=True, location="model.onnx.data", size_threshold=0)


def run(folder: Path, x: np.ndarray, ids: np.ndarray | None = None) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {"x": x} if ids is None else {"x": x, "input_ids": ids}), strict=True))


def operators(folder: Path) -> list[str]:
    return sorted(node.op_type for node in onnx.load(folder / "model.onnx").graph.node)


def largest_errors(weight: np.ndarray, method: Quantization) -> np.ndarray:
    """The largest error of each entry of `weight` `[in, out]`.

    With offsets it is half of a step. Without, it is a whole step at the end of a group where one side is shorter.
    """
    padded = np.pad(weight, ((0, -len(weight) % method.group_size), (0, 0)), mode="edge")
    groups = padded.reshape(-1, method.group_size, weight.shape[1])
    low, high = groups.min(axis=1), groups.max(axis=1)
    furthest = np.maximum(high, -low)
    if method.symmetric:
        errors = furthest / 2 ** (method.bits - 1)
    else:
        errors = (high - low) / (2**method.bits - 1) / 2 + FLOAT16_ROUNDING * furthest
    return np.repeat(errors, method.group_size, axis=0)[: len(weight)]


@pytest.mark.parametrize("how", [INT8_32, INT4_32, ASYMMETRIC, Quantization(8, 64, False)], ids=str)
def test_every_weight_is_within_its_step_and_the_memory_is_untouched(how, weights, tmp_path):
    write_graph(tmp_path, weights)
    identity = np.eye(WIDE, dtype=np.float32)  # its product with a weight is the weight
    before = run(tmp_path, identity)
    assert quantize_graph(tmp_path, how, [weights["memory"]]) == 3
    after = run(tmp_path, identity)
    np.testing.assert_array_equal(after["memory_out"], before["memory_out"])
    for name, weight in (("base", weights["base"]), ("gemm", weights["gemm"].T), ("head", weights["head"].T)):
        off = np.abs(after[f"{name}_out"] - before[f"{name}_out"])
        assert (off <= largest_errors(weight, how) + ROUNDING).all()
        assert off.max() > ROUNDING  # it is quantised
    assert {file.name for file in tmp_path.iterdir()} == {"model.onnx", "model.onnx.data"}
    tensors = constants(tmp_path)
    np.testing.assert_array_equal(tensors["memory"], weights["memory"])
    assert not {"base", "gemm", "head"} & tensors.keys()
    assert any("offsets" in name for name in tensors) is not how.symmetric
    nodes = [node for node in onnx.load(tmp_path / "model.onnx").graph.node if node.op_type == "MatMulNBits"]
    attributes = [{attribute.name: attribute.i for attribute in node.attribute} for node in nodes]
    for name, value in {"bits": how.bits, "block_size": how.group_size, "accuracy_level": ACCURACY_LEVEL}.items():
        assert [node_attributes[name] for node_attributes in attributes] == [value] * 3


@pytest.mark.parametrize("how", [INT8_32, INT4_32, Quantization(4, 32, False), Quantization(8, 32, False)], ids=str)
@pytest.mark.parametrize("stored", ["once", "transposed too"])
def test_a_tied_embedding_is_stored_once(how, stored, weights, tmp_path):
    """Both operators' kernels use the same rows for the lookup and for the logits."""
    if stored == "once":
        write_graph(tmp_path, weights, "embedding head")
    else:
        write_graph(
            tmp_path, {"base": np.ascontiguousarray(weights["head"].T), "embedding": weights["head"]}, "embedding base"
        )
    assert quantize_graph(tmp_path, how, []) == 1
    assert operators(tmp_path) == ["GatherBlockQuantized", "MatMulNBits", "Reshape"]
    tensors = constants(tmp_path)
    assert len(tensors) == 3  # numbers, scales, and the shape of the rows
    rows, columns = run(tmp_path, np.eye(WIDE, dtype=np.float32), np.arange(VOCABULARY)).values()
    np.testing.assert_allclose(rows, columns.T, atol=ROUNDING)
    off = np.abs(rows - weights["head"])
    assert off.max() > ROUNDING and (off <= largest_errors(weights["head"].T, INT8_32).T + ROUNDING).all()


@pytest.mark.parametrize("tied", [True, False])
def test_the_vocabulary_keeps_eight_bits_in_int4(tied, weights, tmp_path):
    if not tied:
        weights["embedding"] = weights["head"][::-1].copy()
    write_graph(tmp_path, weights, "base embedding head")
    quantize_graph(tmp_path, Quantization(4, 32, False), [])
    nodes = onnx.load(tmp_path / "model.onnx").graph.node
    bits = {node.output[0]: next(a.i for a in node.attribute if a.name == "bits") for node in nodes if node.domain}
    assert sorted(bits.values()) == [4, 8, 8]
    assert bits["embedding_out"] == bits["head_out"] == 8


def test_weights_of_q4_1_are_kept(tmp_path):
    """The format of GGUF: in each group of 32, sixteen numbers at equal distances, whose first one is any number."""
    random = np.random.default_rng(0)
    scales, lowest = random.uniform(0.01, 0.1, (3, 1, 48)), random.uniform(-1, 0.2, (3, 1, 48))
    numbers = random.integers(0, 16, (3, 32, 48))
    numbers[:, 0], numbers[:, 1] = 0, 15
    weight = (numbers * scales + lowest).reshape(WIDE, 48).astype(np.float32)
    write_graph(tmp_path, {"base": weight}, "base")
    quantize_graph(tmp_path, Quantization(4, 32, False), [])
    found = run(tmp_path, np.eye(WIDE, dtype=np.float32))["base_out"]
    np.testing.assert_allclose(found, weight, rtol=0, atol=FLOAT16_ROUNDING * np.abs(weight).max() + ROUNDING)


def test_products_of_one_input_share_its_sums(weights, tmp_path):
    """In exact arithmetic, x · W of the stored numbers; the kernel rounds x to 8 bits."""
    write_graph(tmp_path, weights, "base gemm")
    quantize_graph(tmp_path, Quantization(4, 32, False), [])
    assert operators(tmp_path) == sorted(["MatMulNBits", "MatMul", "Cast", "Add"] * 2 + ["MatMul", "Add"])
    x = np.random.default_rng(1).normal(size=(3, WIDE)).astype(np.float32)
    stored, found = run(tmp_path, np.eye(WIDE, dtype=np.float32)), run(tmp_path, x)
    bias = weights["bias"]
    for name, expected in (("base", x @ stored["base_out"]), ("gemm", x @ (stored["gemm_out"] - bias) + bias)):
        error = np.abs(found[f"{name}_out"] - expected).max()
        assert error < ACTIVATION_ERROR * np.abs(expected).max()


def test_an_untied_embedding_is_stored_separately(weights, tmp_path):
    weights["embedding"] = weights["head"][::-1].copy()
    write_graph(tmp_path, weights, "embedding head")
    quantize_graph(tmp_path, INT8_32, [])
    rows, columns = run(tmp_path, np.eye(WIDE, dtype=np.float32), np.arange(VOCABULARY)).values()
    np.testing.assert_allclose(rows, columns.T[::-1], atol=ROUNDING)
    assert sum("quantized" in name for name in constants(tmp_path)) == 2


def test_an_embedding_with_incomplete_groups_is_not_quantised(weights, tmp_path):
    write_graph(tmp_path, weights, "embedding head")
    quantize_graph(tmp_path, Quantization(4, 64, True), [])
    assert operators(tmp_path) == ["Gather", "MatMulNBits"]
    np.testing.assert_array_equal(constants(tmp_path)["head"], weights["head"])


def test_a_matrix_is_stored_once_per_orientation(tmp_path):
    """Two uses as is and one transposed give two sets of groups."""
    weight = np.random.default_rng(0).normal(size=(WIDE, WIDE)).astype(np.float32)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", WIDE])
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", WIDE]) for name in "abc"]
    nodes = [helper.make_node("MatMul", ["x", "w"], [name]) for name in "ab"]
    nodes.append(helper.make_node("Gemm", ["x", "w"], ["c"], transB=1))
    save(tmp_path, helper.make_graph(nodes, "shared", [x], outputs, [numpy_helper.from_array(weight, "w")]))
    assert quantize_graph(tmp_path, INT4_32, []) == 3
    assert sum("quantized" in name for name in constants(tmp_path)) == 2
    a, b, c = run(tmp_path, np.eye(WIDE, dtype=np.float32)).values()
    np.testing.assert_array_equal(a, b)
    assert (np.abs(a - weight) <= largest_errors(weight, INT4_32) + ROUNDING).all()
    assert (np.abs(c - weight.T) <= largest_errors(weight.T, INT4_32) + ROUNDING).all()


def test_embeddings_are_found_behind_scaled_logits_and_reshaped_tokens(weights, tmp_path):
    """Fusion scales the capped logits of Gemma 2, and GPT-2 reshapes its tokens. A lookup by position stays."""
    head = weights["head"]
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", WIDE]),
        helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["T"]),
    ]
    sizes = {"logits": ["B", VOCABULARY], "rows": [1, "T", WIDE], "places": ["T", WIDE]}
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, size) for name, size in sizes.items()]
    nodes = [
        helper.make_node("FusedMatMul", ["x", "head"], ["logits"], domain="com.microsoft", transB=1, alpha=0.5),
        helper.make_node("GatherElements", ["input_ids", "order"], ["ordered"], axis=0),
        helper.make_node("Reshape", ["ordered", "shape"], ["ids"]),
        helper.make_node("Gather", ["head", "ids"], ["rows"]),
        helper.make_node("Abs", ["input_ids"], ["positions"]),
        helper.make_node("Gather", ["positional", "positions"], ["places"]),
    ]
    arrays = {"head": head, "shape": np.array([1, -1], np.int64), "positional": weights["base"].T.copy()}
    arrays["order"] = np.arange(48)[::-1].copy()
    initializers = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    save(tmp_path, helper.make_graph(nodes, "scaled", inputs, outputs, initializers))
    assert quantize_graph(tmp_path, INT8_32, []) == 1
    logits, rows, places = run(tmp_path, np.eye(WIDE, dtype=np.float32), np.arange(48)).values()
    np.testing.assert_array_equal(places, weights["base"].T)
    np.testing.assert_allclose(rows[0, ::-1], 2 * logits.T[:48], atol=ROUNDING)
    off = np.abs(2 * logits.T - head)
    assert off.max() > ROUNDING and (off <= largest_errors(head.T, INT8_32).T + ROUNDING).all()


@pytest.mark.parametrize("how", [INT4_32, Quantization(4, 32, False), INT8_32], ids=str)
@pytest.mark.parametrize("rows", [16, 40, 96])
def test_incomplete_and_odd_numbers_of_groups_are_quantised(how, rows, tmp_path):
    """Covers half a group, one and a quarter, and three, in ONNX Runtime's kernel."""
    weight = np.random.default_rng(rows).normal(size=(rows, 5)).astype(np.float32)
    weight[:, 0] = 0
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", rows])
    y = helper.make_tensor_value_info("base_out", TensorProto.FLOAT, ["B", 5])
    node = helper.make_node("MatMul", ["x", "base"], ["base_out"])
    save(tmp_path, helper.make_graph([node], "product", [x], [y], [numpy_helper.from_array(weight, "base")]))
    assert quantize_graph(tmp_path, how, []) == 1
    actual = run(tmp_path, np.eye(rows, dtype=np.float32))["base_out"]
    assert (np.abs(actual - weight) <= largest_errors(weight, how) + ROUNDING).all()


def test_a_matrix_with_a_part_of_the_memory_is_not_quantised(weights, tmp_path):
    """Fusions concatenate weights that read the same input."""
    packed = np.concatenate([weights["base"], weights["memory"]], axis=1)
    write_graph(tmp_path, {**weights, "base": packed}, "base gemm")
    x = np.random.default_rng(1).normal(size=(3, WIDE)).astype(np.float32)
    before = run(tmp_path, x)
    assert quantize_graph(tmp_path, INT8_32, [weights["memory"]]) == 1
    np.testing.assert_array_equal(run(tmp_path, x)["base_out"], before["base_out"])


def test_base_weights_packed_with_the_memory_are_quantised(weights, tmp_path):
    """One product combines two matrices of the base and, between them, the memory's. The base's are taken out."""
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
    save(tmp_path, helper.make_graph(nodes, "packed", [x], outputs, initializers))
    assert quantize_graph(tmp_path, INT8_32, [memory]) == 1
    inputs = np.random.default_rng(1).normal(size=(3, WIDE)).astype(np.float32)
    first, own, last = run(tmp_path, inputs).values()
    np.testing.assert_allclose(own, inputs @ memory, atol=1e-4)
    np.testing.assert_array_equal(first, last)
    exact = inputs @ base
    assert 1e-3 < np.abs(first - exact).max() < 0.1 * np.abs(exact).max()


def test_repeated_columns_of_the_memory_are_stored_once(weights, tmp_path):
    """A fused memory has columns of zeros, repeated columns, and rows of zeros."""
    own = weights["memory"].copy()
    own[32:] = 0
    weights["memory"] = np.concatenate([own, own[:, 4:12], np.zeros_like(own), own[:, :1]], axis=1)
    write_graph(tmp_path, weights, "memory base")
    x = np.random.default_rng(1).normal(size=(3, WIDE)).astype(np.float32)
    before = run(tmp_path, x)["memory_out"]
    quantize_graph(tmp_path, INT8_32, [weights["memory"]])
    np.testing.assert_array_equal(run(tmp_path, x)["memory_out"], before)
    stored = constants(tmp_path)
    assert stored["memory_distinct"].shape == (32 + 1, 16 + 1)  # those of `own`, and one of zeros
    gathered = [array for array in stored.values() if array.shape == weights["memory"].shape]
    assert [array.tobytes() for array in gathered] == [weights["memory"].tobytes()]
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "loaded.onnx")
    onnxruntime.InferenceSession(tmp_path / "model.onnx", options, providers=["CPUExecutionProvider"])
    assert "Gather" not in {node.op_type for node in onnx.load(tmp_path / "loaded.onnx").graph.node}


def test_a_memory_that_cannot_be_located_raises(weights, tmp_path):
    write_graph(tmp_path, {**weights, "memory": weights["memory"] * 3})
    files = [(tmp_path / name).read_bytes() for name in ("model.onnx", "model.onnx.data")]
    with pytest.raises(ExportError, match="16 of their columns"):
        quantize_graph(tmp_path, INT4_32, [weights["memory"]])
    assert [(tmp_path / name).read_bytes() for name in ("model.onnx", "model.onnx.data")] == files


def test_a_graph_with_nothing_to_quantise_raises(weights, tmp_path):
    write_graph(tmp_path, weights, "memory")
    with pytest.raises(ExportError, match="nothing to quantise"):
        quantize_graph(tmp_path, INT8_32, [weights["memory"]])


# What an 8-bit and a 4-bit base of random weights may do to logits and states: root mean squares, of their own. Logits
# that are unrelated are 1.4 apart.

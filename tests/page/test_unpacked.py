"""The graph of a page for WebAssembly: the same products, of weights that become float32 when it is loaded."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from deltamem_tool.page import unpacked
from deltamem_tool.page.unpacked import write_unpacked

TOLERANCE = 1e-5
ROWS, COLUMNS, GROUP = 6, 64, 32


def graph_of(path, bits, zero_points=False):
    """A product with random weights, which lie in another file."""
    random = np.random.default_rng(bits)
    packed = random.integers(0, 256, (ROWS, COLUMNS // GROUP, GROUP * bits // 8), np.uint8)
    scales = random.standard_normal((ROWS, COLUMNS // GROUP)).astype(np.float32)
    tensors = {"packed": packed, "scales": scales}
    if zero_points:
        tensors["zeros"] = random.integers(0, 256, (ROWS, COLUMNS // GROUP * bits // 8), np.uint8)
    options = {"K": COLUMNS, "N": ROWS, "bits": bits, "block_size": GROUP, "accuracy_level": 1}
    node = helper.make_node("MatMulNBits", ["x", *tensors], ["y"], domain="com.microsoft", **options)
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, size])
        for name, size in (("x", COLUMNS), ("y", ROWS))
    ]
    weights = [numpy_helper.from_array(array, name) for name, array in tensors.items()]
    graph = helper.make_graph([node], "product", ends[:1], ends[1:], weights)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.save(model, path, save_as_external_data=True, location="model.onnx.data", size_threshold=0)


def computed(path):
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    x = np.random.default_rng(0).standard_normal((1, COLUMNS)).astype(np.float32)
    return session.run(["y"], {"x": x})[0]


@pytest.mark.parametrize("bits", [4, 8])
def test_it_computes_the_same_of_the_same_file(tmp_path, bits):
    graph_of(tmp_path / "model.onnx", bits)
    data = (tmp_path / "model.onnx.data").read_bytes()
    assert write_unpacked(tmp_path / "model.onnx", tmp_path / "unpacked.onnx")
    assert (tmp_path / "model.onnx.data").read_bytes() == data
    nodes = [node.op_type for node in onnx.load(tmp_path / "unpacked.onnx", load_external_data=False).graph.node]
    assert nodes == ["DequantizeLinear", "Transpose", "MatMul"]
    actual, expected = computed(tmp_path / "unpacked.onnx"), computed(tmp_path / "model.onnx")
    np.testing.assert_allclose(actual, expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_what_cannot_be_unpacked_stays(tmp_path, monkeypatch):
    graph_of(tmp_path / "model.onnx", 4, zero_points=True)
    assert not write_unpacked(tmp_path / "model.onnx", tmp_path / "unpacked.onnx")
    graph_of(tmp_path / "model.onnx", 4)
    monkeypatch.setattr(unpacked, "MAX_UNPACKED_BYTES", 4 * ROWS * COLUMNS - 1)
    assert not write_unpacked(tmp_path / "model.onnx", tmp_path / "unpacked.onnx")
    assert not (tmp_path / "unpacked.onnx").exists()

"""Exporting a half-precision model: which tensors are float16 or float32, and the tolerance of the comparison."""

from __future__ import annotations

import dataclasses
import shutil
import weakref
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from helpers.graph_constants import columns
from onnx import TensorProto, helper, numpy_helper
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from deltamem_tool import attach
from deltamem_tool.cli.export import _agreement
from deltamem_tool.config import DeltaMemConfig
from deltamem_tool.errors import ExportError
from deltamem_tool.memory.attach import adapter_of
from deltamem_tool.memory.cache import MemoryCache
from deltamem_tool.onnx.export import compare as check
from deltamem_tool.onnx.export import export
from deltamem_tool.onnx.export.fused_memory import fused_memories
from deltamem_tool.onnx.export.quantize import memory_weights, quantize_graph
from deltamem_tool.onnx.export.targets import TARGETS
from deltamem_tool.onnx.manifest import Manifest, Quantization
from deltamem_tool.onnx.runtime.engine import OnnxModel

ROUNDING = 0.01  # for float16, with logits of size 5 and states of size 1
SIZE, MLP = 32, 56  # of hidden states and of the MLP; no matrix of the memory has this shape


def one_layer(*dtypes: torch.dtype) -> PreTrainedModel:
    """One layer with random weights, converted to each type in turn, and a memory."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=259,
        hidden_size=SIZE,
        intermediate_size=MLP,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=0.2,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=None,
    )
    model = Qwen3ForCausalLM(config).eval()
    for dtype in dtypes:
        model = model.to(dtype)
    adapter = attach(model, DeltaMemConfig(rank=4, state_heads=2, branches=("q", "v", "o")))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(std=0.3)
    return model


@pytest.fixture(scope="module")
def float16(qwen3, tmp_path_factory) -> tuple[PreTrainedModel, Path, Manifest]:
    """A model, its folder and its manifest."""
    model, folder = one_layer(torch.float16), tmp_path_factory.mktemp("half") / "exported"
    before = {name: (weight.data_ptr(), weight.clone()) for name, weight in model.state_dict().items()}
    manifest = export.export_onnx(model, qwen3.tokenizer, folder)
    for name, weight in model.state_dict().items():  # the comparison has converted it to float32 and back
        address, saved = before[name]
        torch.testing.assert_close(weight, saved, rtol=0, atol=0)
        assert weight.data_ptr() == address  # memory-mapped weights stay mapped
    return model, folder, manifest


def memory_in(model: PreTrainedModel) -> list[np.ndarray]:
    """The memory's matrices in the graph."""
    adapter = adapter_of(model)
    return memory_weights(adapter, fused_memories(adapter, TARGETS["cpu"], ()))


def test_keys_and_values_are_float16_and_the_memory_float32(float16):
    model, folder, _ = float16
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    types = {value.name: value.type for value in (*session.get_inputs(), *session.get_outputs())}
    assert types["past_key_values.0.key"] == types["present.0.value"] == "tensor(float16)"
    assert types["past_key_values.0.recurrent_state"] == types["present.0.recurrent_state"] == "tensor(float)"
    assert types["logits"] == "tensor(float)"
    graph = onnx.load(folder / "model.onnx").graph
    tensors = [numpy_helper.to_array(tensor) for tensor in graph.initializer]
    columns = {column.tobytes() for x in tensors if x.dtype == np.float32 and x.ndim == 2 for column in x.T}
    assert all(column.tobytes() in columns for weight in memory_in(model) for column in weight.T)
    of_base = [x for x in tensors if x.shape in ((259, SIZE), (SIZE, MLP), (MLP, SIZE))]  # embedding, MLP
    assert len(of_base) == 4 and {x.dtype for x in of_base} == {np.dtype(np.float16)}


def test_a_half_precision_graph_matches_float32_with_the_same_weights(float16):
    _, folder, manifest = float16
    runtime, truth = OnnxModel(folder), one_layer(torch.float16, torch.float32)
    assert manifest.interface.dtype == "float16"
    assert 0 < manifest.max_abs_diff < ROUNDING
    ids = np.random.default_rng(3).integers(0, 256, (1, 30))
    cache, past = MemoryCache(truth), runtime.graph.empty_past(1)
    for start, end in ((0, 20), (20, 29), (29, 30)):
        with torch.no_grad():
            expected = truth(torch.from_numpy(ids[:, start:end]), cache=cache).logits[0, -1]
        mask, write = np.ones((1, end), np.int64), np.ones((1, end - start), bool)
        logits, past = runtime.graph.step(ids[:, start:end], mask, write, past)
        np.testing.assert_allclose(logits[0, -1], expected.numpy(), rtol=0, atol=ROUNDING)
    np.testing.assert_allclose(runtime.graph.states(past)[0], cache.memory.layers[0], rtol=0, atol=ROUNDING)


@pytest.mark.parametrize(("bits", "largest"), [(8, 0.3), (4, 3)])
def test_a_half_precision_graph_can_be_quantised(bits, largest, float16, tmp_path):
    model, folder, _ = float16
    copy = shutil.copytree(folder, tmp_path / "quantised")
    assert quantize_graph(copy, Quantization(bits, 16, True), memory_in(model)) > 0
    plain, quantized = OnnxModel(folder), OnnxModel(copy)
    ids, mask, write = np.arange(20)[None] + 65, np.ones((1, 20), np.int64), np.ones((1, 20), bool)
    logits, _ = plain.graph.step(ids, mask, write, plain.graph.empty_past(1))
    found, _ = quantized.graph.step(ids, mask, write, quantized.graph.empty_past(1))
    assert ROUNDING < np.abs(found - logits).max() < largest  # for logits of size 5
    in_graph = columns(copy)
    assert all(column.tobytes() in in_graph for weight in memory_in(model) for column in weight.T)


def test_onnx_runtime_is_released_before_pytorch_converts_to_float32(float16, monkeypatch):
    """Otherwise, both would hold the weights in float32 at the same time."""
    model, folder, _ = float16
    opened = []

    def open_graph():
        graph = OnnxModel(folder).graph
        opened.append(weakref.ref(graph))
        return graph

    own = check._in_float32

    def watched(model):
        assert [graph() for graph in opened] == [None]
        return own(model)

    monkeypatch.setattr(check, "_in_float32", watched)
    assert 0 < export._compare_with_pytorch(open_graph, model, export.CallOptions(model, "last")) < ROUNDING


def test_an_error_beyond_rounding_raises(float16, qwen3, monkeypatch, tmp_path):
    """In a large model, float32's tolerance would accept this error; PyTorch's own rounding does not explain it."""
    model, folder, _ = float16
    graph = OnnxModel(folder).graph
    own = graph.step

    def off(*args):
        logits, past = own(*args)
        return logits + 3 * ROUNDING, past

    monkeypatch.setattr(graph, "step", off)
    options = export.CallOptions(model, "last")
    with pytest.raises(ExportError, match="does not compute what PyTorch computes"):
        export._compare_with_pytorch(lambda: graph, model, options)


def test_a_graph_that_cannot_run_here_is_reported_as_not_compared(qwen3, tmp_path):
    """bfloat16 for CUDA, on a CPU; the same graph for a CPU is an error."""
    bfloat16 = TensorProto.BFLOAT16
    x, y = (helper.make_tensor_value_info(name, bfloat16, ["N", 4]) for name in "xy")
    weight = helper.make_tensor("w", bfloat16, [4, 4], np.ones(16))
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "product", [x], [y], [weight])
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "model.onnx"
    )
    interface = qwen3.manifest.interface
    if not torch.cuda.is_available():
        assert export._open_if_runnable(tmp_path, interface, TARGETS["cuda"]) is None
    with pytest.raises(ExportError, match="NOT_IMPLEMENTED"):
        export._open_if_runnable(tmp_path, interface, TARGETS["cpu"])
    assert export._compare_with_pytorch(lambda: None, qwen3.model, export.CallOptions(qwen3.model, "last")) is None
    manifest = dataclasses.replace(qwen3.manifest, max_abs_diff=None)
    assert Manifest.from_json(manifest.to_json()) == manifest
    assert _agreement(manifest).startswith("not compared: ")

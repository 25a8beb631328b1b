"""Combined export options: a memory that writes by message, fixed lengths, quantisation, half precision."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import pytest
import torch
from helpers.graph_constants import columns
from helpers.tiny import tiny_tokenizer
from memory.test_static_cache import model_of
from numpy.typing import NDArray
from onnx import TensorProto

from deltamem_tool.chat.conversation import Conversation
from deltamem_tool.chat.sampling import Sampling
from deltamem_tool.memory.attach import adapter_of
from deltamem_tool.memory.call_options import CallOptions
from deltamem_tool.onnx.export.compare import greedy_agreement
from deltamem_tool.onnx.export.export import TOLERANCE, export_onnx
from deltamem_tool.onnx.export.rewrites import JOIN_WEIGHTS
from deltamem_tool.onnx.export.targets import INT4, INT8
from deltamem_tool.onnx.runtime.engine import OnnxModel

pytestmark = pytest.mark.slow

BY_MESSAGE = {"granularity": "message", "couple_lambda": False}
LENGTH = 112
# For logits of up to 8, with random weights in 8 and 4 bits.
LARGEST = {INT8: 2.0, INT4: 8.0}
SAID = ("My dog is Bella.", "What is the name of my dog?")


@pytest.fixture(scope="module")
def static_message_export(exported_with):
    """A fixed length, with the memory's weights separate from the base's, as quantisation requires."""
    return exported_with("fixed-by-message", BY_MESSAGE, max_length=LENGTH, without=JOIN_WEIGHTS)


@pytest.fixture(params=[INT8, INT4])
def quantised_export(request, static_message_export, write_instead, tmp_path):
    """The same graph after the whole export except tracing."""
    write_instead(static_message_export)
    model, tokenizer = static_message_export.model, static_message_export.tokenizer
    manifest = export_onnx(model, tokenizer, tmp_path / "out", max_length=LENGTH, quantize=request.param)
    return dataclasses.replace(static_message_export, folder=tmp_path / "out", manifest=manifest)


def states(conversation: Conversation) -> list[NDArray]:
    return list(conversation.memory.states.values())


def test_a_quantised_graph_reports_its_error_and_keeps_the_memory_weights(quantised_export, static_message_export):
    manifest, plain = quantised_export.manifest, static_message_export.manifest
    assert manifest.interface == plain.interface and manifest.interface.max_length == LENGTH
    assert plain.max_abs_diff < TOLERANCE < manifest.max_abs_diff < LARGEST[manifest.quantize]
    assert 0.5 < manifest.greedy_agreement <= 1
    actual = columns(quantised_export.folder)
    matrices = [weight.detach() for weight in adapter_of(quantised_export.model).parameters() if weight.dim() == 2]
    assert all(row.numpy().tobytes() in actual for matrix in matrices for row in matrix)


def test_a_quantised_conversation_writes_its_messages(quantised_export, tmp_path):
    model, short = OnnxModel(quantised_export.folder), Sampling(max_new_tokens=4)
    conversation, other = Conversation(model), Conversation(model)
    conversation.generate(SAID[0], short)
    once = states(conversation)
    conversation.save_memory(tmp_path / "memory.safetensors")
    other.load_memory(tmp_path / "memory.safetensors")
    for x, y in zip(once, states(other), strict=True):
        np.testing.assert_array_equal(x, y)
    conversation.generate(SAID[1], short)
    for x, y in zip(once, states(conversation), strict=True):
        assert np.abs(x).max() > 0.01 and np.abs(x - y).max() > 0.01


def test_greedy_tokens_depend_on_the_written_segments(message_export):
    """A graph that loses its states chooses other tokens."""
    graph, options = OnnxModel(message_export.folder).graph, CallOptions(message_export.model, "last")
    assert greedy_agreement(message_export.model, graph, options) == 1
    step = graph.step

    def forgetting(*inputs):
        logits, past = step(*inputs)
        empty = {layer: np.zeros_like(state) for layer, state in graph.states(past).items()}
        return logits, graph.with_memory(past, empty, graph.segments(past))

    graph.step = forgetting
    assert greedy_agreement(message_export.model, graph, options) < 0.95


@pytest.mark.slow
def test_a_half_precision_graph_for_cuda_that_writes_by_message(exported_with):
    """The export compares the results on ONNX Runtime's CPU provider. The graph's types are those of the contract."""
    exported = exported_with("cuda-float16-by-message", BY_MESSAGE, torch.float16, target="cuda")
    manifest, graph = exported.manifest, onnx.load(exported.folder / "model.onnx").graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)}
    named = {"float16": TensorProto.FLOAT16, "float32": TensorProto.FLOAT, "int64": TensorProto.INT64}
    named["bool"] = TensorProto.BOOL
    expected = {**manifest.interface.inputs(), **manifest.interface.outputs()}
    assert types == {name: named[dtype] for name, (dtype, _) in expected.items()}
    assert manifest.interface.segment and manifest.interface.dtype == "float16"
    weights = {tensor.data_type for tensor in graph.initializer if len(tensor.dims) == 2}
    assert weights == {TensorProto.FLOAT16, TensorProto.FLOAT}  # the base's, and the memory's
    assert 0 < manifest.max_abs_diff < 0.02


def test_sliding_windows_with_a_fixed_length_match_pytorch(tmp_path):
    """Layers with a window keep every column and see the last ones. Those of PyTorch keep only these."""
    model = model_of("sliding")
    manifest = export_onnx(model, tiny_tokenizer(), tmp_path / "out", max_length=LENGTH)
    assert manifest.interface.packed and manifest.interface.max_length == LENGTH
    assert manifest.max_abs_diff < TOLERANCE

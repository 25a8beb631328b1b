"""Attention fused into one operator: the operator against the equation, and models that cannot use it."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from base_model.test_export_sweep import TOLERANCE, exported_difference, patched
from onnx import TensorProto, helper
from torch import Tensor

from deltamem_tool import MemoryCache
from deltamem_tool.onnx.export.attention import attention, fusion_obstacle

OPERATOR_TOLERANCE = 1e-5  # float32, sums in another order
BATCH, HEADS, KV_HEADS, WIDTH, ROOM = 2, 4, 2, 16, 64
DEPTH = 4  # two rounds of a pattern of two layers


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize(("past", "tokens"), [(0, 11), (17, 1)])
def test_the_operator_matches_the_equation(past: int, tokens: int, window: int, softcap: float, sinks: bool):
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(BATCH, n, past + tokens, WIDTH, generator=random) for n in (HEADS, KV_HEADS, KV_HEADS))
    sink = torch.randn(HEADS, generator=random) if sinks else None
    scale = 0.3
    expected = attention(q, k, v, scale, window, softcap, sink)[:, :, past:]
    settings = {"scale": scale, "local_window_size": window or -1, "softcap": softcap}
    torch.testing.assert_close(
        operator(q, k, v, past, sink, settings), expected, rtol=OPERATOR_TOLERANCE, atol=OPERATOR_TOLERANCE
    )


def operator(q: Tensor, k: Tensor, v: Tensor, past: int, sinks: Tensor | None, settings: dict[str, float]) -> Tensor:
    """The output of `GroupQueryAttention` for the tokens after the first `past`."""
    feeds = {name: flat(x[:, :, past:]) for name, x in (("query", q), ("key", k), ("value", v))}
    for name, x in (("past_key", k), ("past_value", v)):
        feeds[name] = torch.nn.functional.pad(x[:, :, :past], (0, 0, 0, ROOM - past)).numpy()
    feeds["last"] = np.full(BATCH, q.shape[2] - 1, np.int32)
    feeds["total"] = np.array(q.shape[2], np.int32)
    inputs = list(feeds)
    if sinks is not None:
        feeds["sinks"] = sinks.numpy()
        inputs += ["", "", "", "", "sinks"]
    node = helper.make_node(
        "GroupQueryAttention",
        inputs,
        ["output", "present_key", "present_value"],
        domain="com.microsoft",
        num_heads=HEADS,
        kv_num_heads=KV_HEADS,
        **settings,
    )
    types = {name: onnx.helper.np_dtype_to_tensor_dtype(array.dtype) for name, array in feeds.items()}
    values = [helper.make_tensor_value_info(name, of, None) for name, of in types.items()]
    results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in node.output]
    graph = helper.make_graph([node], "attention", values, results)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    output = torch.from_numpy(session.run(["output"], feeds)[0])
    return output.view(BATCH, -1, HEADS, WIDTH).transpose(1, 2)


def flat(x: Tensor) -> np.ndarray:
    return x.transpose(1, 2).flatten(2).numpy()


# Windows and chunks are shorter than the texts.
@pytest.mark.parametrize(
    ("model_type", "why"),
    [
        ("gemma2", None),
        ("gpt_oss", None),
        ("cohere", None),
        ("gpt_neox", None),
        ("gptj", None),
        ("qwen3", None),
        ("afmoe", None),
        ("bloom", "the model's own"),
        ("deepseek_v3", "differ in width"),
        ("diffllama", "changes keys or values after they are stored"),
        ("falcon", "fails without a mask"),
        ("gemma4_text", "share the keys of others"),
        ("llama4_text", "computes something else"),
    ],
)
def test_fusion_obstacle_finds_models_that_cannot_be_fused(model_type: str, why: str | None):
    model = patched(model_type, DEPTH)
    obstacle = fusion_obstacle(model, len(MemoryCache(model).layers))
    assert obstacle is None if why is None else why in (obstacle or "")


def test_a_long_window_is_detected_with_a_short_text():
    """Llama 4 has its chunks only in its masks, where they have no effect on a short text."""
    model = patched("llama4_text", DEPTH)
    size = 8192
    model.config.attention_chunk_size = size
    assert fusion_obstacle(model, DEPTH) == "it computes something else"
    assert model.config.attention_chunk_size == size


# The features specific to each model.
@pytest.mark.slow
@pytest.mark.parametrize(
    "model_type",
    [
        "gemma2",  # softcaps, windows in every second layer, a scale of its own
        "gpt_oss",  # sinks, windows in every second layer
        "cohere",  # neighbouring pairs are rotated
        "gptj",  # also for a part of each head
        "gpt_neox",  # halves of a part of each head
        "mistral",  # windows in every layer
        "qwen3",  # norms of queries and keys
        "opt",  # no rotary embeddings
    ],
)
def test_a_fused_model_matches_pytorch(model_type: str, tmp_path):
    difference = exported_difference(model_type, tmp_path / "onnx", DEPTH)
    assert difference.packed
    assert difference.plain < TOLERANCE
    assert difference.padded < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("llama", {"hidden_size": 64, "head_dim": 16}),  # halves
        ("cohere", {"hidden_size": 64, "head_dim": 16}),  # neighbours
        ("phi", {"hidden_size": 128}),  # halves of a part of each head, which the model cuts off
        ("glm4", {"head_dim": 32}),  # neighbours in a part of each head, which its rotary embedding cuts off
    ],
)
def test_the_operator_includes_the_rotary_embedding(model_type: str, changes: dict[str, int], tmp_path):
    difference = exported_difference(model_type, tmp_path / "onnx", 1, changes=changes)
    assert difference.plain < TOLERANCE
    assert difference.padded < TOLERANCE
    nodes = onnx.load(tmp_path / "onnx" / "model.onnx", load_external_data=False).graph.node
    attributes = {x.name: x.i for node in nodes if node.op_type == "GroupQueryAttention" for x in node.attribute}
    assert attributes["do_rotary"] == 1
    assert not any(node.op_type == "RotaryEmbedding" for node in nodes)


@pytest.mark.slow
def test_a_model_that_cannot_be_fused_is_exported_unfused(tmp_path):
    difference = exported_difference("falcon", tmp_path / "onnx", DEPTH)
    assert not difference.packed
    assert difference.plain < TOLERANCE
    assert difference.padded < TOLERANCE

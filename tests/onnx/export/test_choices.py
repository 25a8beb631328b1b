"""`topk` in exported graphs: the first of equal values, and at most as many as there are columns."""

from __future__ import annotations

import sys

import pytest
import torch
from helpers.hybrids import hybrid
from helpers.tiny import tiny_tokenizer

from deltamem_tool.errors import ExportError
from deltamem_tool.onnx.export.cache_layers import CompressedLayer
from deltamem_tool.onnx.export.choices import StableTopK, dynamic_topk
from deltamem_tool.onnx.export.export import export_onnx


def test_the_first_of_equal_values_is_chosen():
    scores = torch.tensor([[0.0, 2.0, 0.0, -1.0] + [0.0] * 60])
    with StableTopK():
        values, indices = scores.topk(3, dim=-1)
        assert torch.topk(scores, 3, largest=False).indices.tolist() == [[3, 0, 2]]
    assert indices.tolist() == [[1, 0, 2]] and values.tolist() == [[2.0, 0.0, 0.0]]


def test_the_smaller_of_two_sizes_is_chosen_when_the_graph_runs():
    model = hybrid("deepseek_v32", tiny_tokenizer())
    module = sys.modules[type(model).__module__]

    class Chosen(torch.nn.Module):
        def forward(self, x):
            return x.topk(module.min(8, x.shape[1])).values

    with dynamic_topk(model):
        assert module.min([3, 1, 2]) == 1 and module.min([2, 3], key=lambda x: -x) == 3
        columns = {"x": {1: torch.export.Dim("columns", min=2, max=64)}}
        program = torch.export.export(
            Chosen(), (torch.rand(2, 5),), dynamic_shapes=columns, prefer_deferred_runtime_asserts_over_guards=True
        )
    assert "min" not in vars(module)
    assert [program.module()(torch.rand(2, size)).shape[1] for size in (5, 8, 30)] == [5, 8, 8]


def test_windows_match_those_of_all_tokens_at_once():
    """There are two more tokens than fill whole windows, so that each call has several windows."""
    layer, every = CompressedLayer(4), torch.rand(1, 9, 2, dtype=torch.float32)
    for start, stop in ((0, 1), (1, 6), (6, 9)):
        windows, gates, first = layer.store_compression_weights(
            "compressor", every[:, start:stop], -every[:, start:stop]
        )
        assert first == 0 and windows.shape == gates.shape == (1, (stop // 4 + 2) * 4, 2)
        assert torch.equal(windows[:, :stop], every[:, :stop]) and not windows[:, stop:].any()
    assert torch.equal(layer.inputs["compressor_gate"], -every[:, None])


@pytest.mark.parametrize(
    ("options", "why"), [({"max_length": 64}, "grow with the text"), ({"target": "genai"}, "does not feed")]
)
def test_options_that_the_model_cannot_have_raise(options, why, tmp_path):
    tokenizer = tiny_tokenizer()
    with pytest.raises(ExportError, match=why):
        export_onnx(hybrid("deepseek_v32", tokenizer), tokenizer, tmp_path / "onnx", **options)
    assert not list(tmp_path.iterdir())

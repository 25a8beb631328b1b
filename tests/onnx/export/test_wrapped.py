"""An export of a model inside a wrapper, and of one that is not called as it counts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.tiny import randomise, tokens
from memory.test_wrapped import compiled, gpt2, with_lora

from deltamem_tool import DeltaMemConfig, attach
from deltamem_tool.errors import ExportError
from deltamem_tool.memory import call_options
from deltamem_tool.onnx.export.export import export_onnx
from deltamem_tool.onnx.runtime.engine import OnnxModel

pytestmark = pytest.mark.slow  # it traces
TOLERANCE = 1e-4


def test_a_padded_row_is_the_row_alone_in_pytorch(tokenizer, tmp_path):
    base = gpt2(n_layer=1)
    model = compiled(with_lora(base))
    randomise(attach(base, DeltaMemConfig(rank=4)))
    manifest = export_onnx(model, tokenizer, tmp_path / "out")
    assert manifest.max_abs_diff < TOLERANCE and manifest.model_type == "gpt2"
    graph, rows = OnnxModel(tmp_path / "out").graph, [tokens(1, 9), tokens(1, 5, seed=1)]
    ids, mask = np.zeros((2, 9), np.int64), np.zeros((2, 9), np.int64)
    for row, text in enumerate(rows):
        ids[row, -text.shape[1] :], mask[row, -text.shape[1] :] = text, 1
    logits, _ = graph.step(ids, mask, mask.astype(bool), graph.empty_past(2))
    for row, text in enumerate(rows):
        with torch.no_grad():
            expected = base(text).logits[0, -1]
        np.testing.assert_allclose(logits[row, -1], expected, atol=TOLERANCE, rtol=0)


def test_padding_that_moves_a_text_is_noticed(tokenizer, tmp_path, monkeypatch):
    """The graph does the same as PyTorch then, and neither does what the text alone says."""
    model = gpt2(n_layer=1)
    randomise(attach(model, DeltaMemConfig(rank=4)))
    monkeypatch.setattr(call_options, "_first_position", lambda model: None)
    with pytest.raises(ExportError, match="does not compute what PyTorch computes"):
        export_onnx(model, tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()

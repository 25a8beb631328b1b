"""Exporting wrapped models, and models whose positions depend on padding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.tiny import randomise, tokens
from memory.test_wrapped import compiled, gpt2, with_lora

from deltamem_tool import DeltaMemConfig, attach
from deltamem_tool.memory import call_options
from deltamem_tool.onnx.export.export import export_onnx
from deltamem_tool.onnx.runtime.engine import OnnxModel

pytestmark = pytest.mark.slow  # it traces
TOLERANCE = 1e-4


def test_a_padded_row_matches_the_row_alone_in_pytorch(tokenizer, tmp_path):
    base = gpt2(n_layer=1)
    model = compiled(with_lora(base))
    randomise(attach(base, DeltaMemConfig(rank=4)))
    manifest = export_onnx(model, tokenizer, tmp_path / "out")
    assert manifest.max_abs_diff < TOLERANCE and manifest.model_type == "gpt2" and not manifest.interface.row_by_row
    check_padded_rows(tmp_path / "out", base)


def test_models_whose_positions_count_padding_run_row_by_row(tokenizer, tmp_path, monkeypatch):
    """The base counts columns. A graph that did the same would give padded rows results that no text alone has."""
    base = gpt2(n_layer=1)
    randomise(attach(base, DeltaMemConfig(rank=4)))
    monkeypatch.setattr(call_options, "_first_position", lambda model: None)
    assert export_onnx(base, tokenizer, tmp_path / "out").interface.row_by_row
    check_padded_rows(tmp_path / "out", base)


def check_padded_rows(folder, base):
    """Check that a row with left padding gives what its text alone gives in PyTorch."""
    graph, rows = OnnxModel(folder).graph, [tokens(1, 9), tokens(1, 5, seed=1)]
    ids, mask = np.zeros((2, 9), np.int64), np.zeros((2, 9), np.int64)
    for row, text in enumerate(rows):
        ids[row, -text.shape[1] :], mask[row, -text.shape[1] :] = text, 1
    logits, _ = graph.step(ids, mask, mask.astype(bool), graph.empty_past(2))
    for row, text in enumerate(rows):
        with torch.no_grad():
            expected = base(text).logits[0, -1]
        np.testing.assert_allclose(logits[row, -1], expected, atol=TOLERANCE, rtol=0)

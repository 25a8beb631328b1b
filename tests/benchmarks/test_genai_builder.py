"""`benchmarks/genai_builder.py`: the graph that exports are compared with computes what PyTorch computes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from genai_builder import BuilderSide, build
from helpers.tiny import save_checkpoint, tiny_model

TOLERANCE = 1e-4  # of logits
CALLS = (5, 1, 3, 1)  # tokens


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "fixed_steps"),
    [([], False), (["prune_lm_head=true"], True)],
    ids=["every position", "the last, in fixed steps"],
)
def test_conversations_match_pytorch(tmp_path, tokenizer, options, fixed_steps):
    """Compares two conversations in succession in the same buffers."""
    shape = {"name": "llama", "hidden_size": 64}  # heads of 16, the least for rotary positions in `GroupQueryAttention`
    checkpoint = save_checkpoint(tmp_path / "model", tokenizer, **shape)
    model = tiny_model(**shape, vocab_size=len(tokenizer))
    build(checkpoint, tmp_path / "onnx", "float32", options)
    side = BuilderSide(tmp_path / "onnx", sum(CALLS), threads=1, fixed_steps=fixed_steps)
    for seed in (0, 1):
        ids = np.random.default_rng(seed).integers(len(tokenizer), size=(1, sum(CALLS)))
        with torch.no_grad():
            expected = model(torch.from_numpy(ids)).logits[0].numpy()
        past = None
        for tokens in CALLS:
            start = past or 0
            logits, past = side.call(ids[:, start : start + tokens], past)
            assert past == start + tokens
            np.testing.assert_allclose(logits[0], expected[past - 1], atol=TOLERANCE)
            assert side.choose(logits).tolist() == [[int(expected[past - 1].argmax())]]

"""Exported model types: three calls of the graph in ONNX Runtime against one call of PyTorch.

Tracing takes seconds a layer, so the types here are one of a kind. All of them: `DELTAMEM_EXPORT_ALL=1 pytest
tests/base_model/test_export_sweep.py`, or `python benchmarks/export_sweep.py` for a table.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.tiny import randomise
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel, PreTrainedTokenizerFast

import deltamem_tool as deltamem
from base_model.exported import EXPORTED
from base_model.test_sweep import VISION
from base_model.tiny_configs import PAD, TEXT_IDS, tiny_config, with_depth
from deltamem_tool import DeltaMemConfig, MemoryCache
from deltamem_tool.errors import ExportError
from deltamem_tool.onnx.export.choices import StableTopK
from deltamem_tool.onnx.export.export import export_onnx
from deltamem_tool.onnx.runtime.buffered_graph import open_graph

pytestmark = pytest.mark.sweep

TOLERANCE = 1e-3
CALLS = (5, 1, 4)  # tokens of each
PADDING = 2  # tokens on the left of the second row
DEPTH = 2  # layers: tracing takes seconds for each
# Types with layers of several kinds: two layers are made, and the memory is in the one of the type's own kind.
UNLIKE = {"deepseek_v3": [1], "gemma3_text": [0]}

# What one has that the others have not. Layers of convolutions or linear attention, and indexers, are in
# tests/onnx/runtime/test_hybrids.py.
ONE_OF_A_KIND = {
    "bart": "counts padding",
    "bloom": "no positions but ALiBi",
    "dbrx": "a loop over experts",
    "deepseek_v3": "latent keys, wider than the values; experts",
    "falcon": "one head of keys; a fused projection",
    "gemma3_text": "sliding windows",
    "gpt2": "learned positions; transposed weights",
    "gpt_neo": "a mask as long as its positions",
    "llama4_text": "complex rotary numbers",
    "opt": "learned positions, counted in the mask",
    "roberta": "positions that begin after the padding id",
}
COUNTS_PADDING = set(
    "bart bigbird_pegasus blenderbot blenderbot-small marian mbart mvp pegasus plbart trocr whisper".split()
)
EVERY = os.environ.get("DELTAMEM_EXPORT_ALL") == "1"


@dataclass(frozen=True)
class Difference:
    """Between ONNX Runtime and PyTorch, the largest over logits and states of a conversation."""

    plain: float
    padded: float  # of one that is padded on the left
    packed: bool  # whether attention is one operator


def patched(
    model_type: str, depth: int = DEPTH, layers: str | list[int] = "all", changes: dict[str, int] | None = None
) -> PreTrainedModel:
    torch.manual_seed(0)
    config = with_depth(tiny_config(model_type), depth)
    for name, value in (changes or {}).items():
        setattr(config, name, value)
    kind = AutoModelForImageTextToText if model_type in VISION else AutoModelForCausalLM
    model = kind.from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1 and not weight.any():  # a router's: the choice among equal experts is undefined
                weight.normal_(std=0.2)
    randomise(deltamem.attach(model, DeltaMemConfig(rank=4, branches=("q", "o"), layers=layers)))
    return model


def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))


def exported_difference(
    model_type: str,
    folder: Path,
    depth: int = DEPTH,
    layers: str | list[int] = "all",
    changes: dict[str, int] | None = None,
) -> Difference:
    """Export the tiny model, and compare: the graph is fed in pieces and padded, PyTorch with each row alone and whole,
    so that nothing of what the exporter assumes about masks and positions is taken for granted."""
    model = patched(model_type, depth, layers, changes)
    interface = export_onnx(model, tokenizer(), folder, logits="all").interface
    graph = open_graph(folder, interface)
    length = sum(CALLS)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(TEXT_IDS.start, TEXT_IDS.stop, (2, length), generator=generator)
    mask = torch.ones_like(ids)
    ids[1, :PADDING], mask[1, :PADDING] = PAD, 0

    past, pieces, start = graph.empty_past(2), [], 0
    for count in CALLS:
        stop = start + count
        logits, past = graph.step(
            ids[:, start:stop].numpy(), mask[:, :stop].numpy(), np.ones((2, count), np.bool_), past
        )
        pieces.append(torch.from_numpy(logits))
        start = stop
    logits, states = torch.cat(pieces, dim=1), graph.states(past)
    assert states

    measured = []
    for row, padding in ((0, 0), (1, PADDING)):
        cache = MemoryCache(model)
        with torch.no_grad(), StableTopK():  # PyTorch does not define which of several equal scores it takes
            expected = model(input_ids=ids[row : row + 1, padding:], cache=cache).logits[0]
        differences = [logits[row, padding:] - expected]
        differences += [torch.from_numpy(state[row]) - cache.memory.layers[i][0] for i, state in states.items()]
        measured.append(max(difference.abs().max().item() for difference in differences))
    return Difference(*measured, interface.packed)


@pytest.mark.parametrize("model_type", sorted(EXPORTED if EVERY else ONE_OF_A_KIND))
def test_the_graph_matches_pytorch(model_type: str, tmp_path: Path):
    if EVERY:
        difference = exported_difference(model_type, tmp_path / "onnx")
    else:
        depth = DEPTH if model_type in UNLIKE else 1
        difference = exported_difference(model_type, tmp_path / "onnx", depth, UNLIKE.get(model_type, "all"))
    assert difference.plain < TOLERANCE
    assert (difference.padded < TOLERANCE) == (model_type not in COUNTS_PADDING)


def test_a_model_that_cannot_be_traced_raises_and_leaves_nothing(tmp_path: Path):
    model = patched("doge", changes={"keep_window_size": 8})  # it drops keys from there on, which needs another graph
    with pytest.raises(ExportError, match="cannot trace DogeForCausalLM"):
        export_onnx(model, tokenizer(), tmp_path / "onnx")
    assert not list(tmp_path.iterdir())

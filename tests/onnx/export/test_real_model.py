"""A published checkpoint with a memory: its graph matches PyTorch, and its base matches another exporter's graph."""

from __future__ import annotations

import pytest
import torch
from genai_builder import build
from onnx_overhead import difference
from transformers import AutoModelForCausalLM, AutoTokenizer

from deltamem_tool import Conversation, DeltaMemConfig, OnnxModel, TorchModel, attach, export_onnx
from deltamem_tool.chat.sampling import Sampling
from deltamem_tool.onnx.export.export import TOLERANCE

pytestmark = pytest.mark.real_model
QUESTIONS = ("My dog is called Bella. What is the capital of France?", "And what is my dog called?")
GREEDY = Sampling(max_new_tokens=16)


@pytest.fixture(scope="module")
def exported(smollm2, tmp_path_factory):
    """MSW on all four branches, random weights."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(smollm2), AutoTokenizer.from_pretrained(smollm2)
    adapter = attach(model, DeltaMemConfig.preset("msw", branches=("q", "k", "v", "o")))
    torch.manual_seed(0)
    with torch.no_grad():
        for layer in adapter.layers.values():
            for branch in adapter.config.branches:
                layer.delta_of(branch).weight.normal_(std=0.02)
    folder = tmp_path_factory.mktemp("smollm2") / "onnx"
    return model, tokenizer, folder, export_onnx(model, tokenizer, folder)


def test_conversations_match_pytorch(exported):
    model, tokenizer, folder, manifest = exported
    assert manifest.max_abs_diff < TOLERANCE
    ours, torchs = Conversation(OnnxModel(folder)), Conversation(TorchModel(model, tokenizer))
    for question in QUESTIONS:
        answer = ours.generate(question, GREEDY).text
        assert len(answer) > 0 and answer == torchs.generate(question, GREEDY).text


def test_with_an_empty_memory_the_graph_matches_onnxruntime_genais(exported, smollm2, tmp_path):
    build(smollm2, tmp_path / "base", "float32", [])
    assert difference(tmp_path / "base", exported[2], threads=1) < TOLERANCE

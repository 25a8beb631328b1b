"""The graphs that `deltamem bench` times in ONNX Runtime match PyTorch, and the export must be the adapter's."""

from __future__ import annotations

import dataclasses
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from deltamem_tool import detach
from deltamem_tool.baselines.lora import random_lora
from deltamem_tool.bench import BASE, MEMORY, ONNX, PYTORCH, SEGMENT
from deltamem_tool.bench.models import read_export, shared_copy, torch_sides, write_graphs
from deltamem_tool.bench.peak import peak_of
from deltamem_tool.bench.setting import Setting
from deltamem_tool.bench.sides import GraphFolder, OnnxSide
from deltamem_tool.errors import ConfigError, ExportError
from deltamem_tool.memory.attach import adapter_of, hook
from deltamem_tool.memory.call_options import CallOptions
from deltamem_tool.onnx.export.base_graph import without_memory, write_plain
from deltamem_tool.onnx.export.export import TOLERANCE
from deltamem_tool.onnx.export.targets import TARGETS
from deltamem_tool.onnx.manifest import Manifest, Quantization
from deltamem_tool.onnx.runtime.buffered_graph import open_graph

PROMPT = SEGMENT + 8  # one message ends in it, one remains open


@contextmanager
def apart(model):
    """The model without its memory, and the memory."""
    adapter = adapter_of(model)
    detach(model)
    try:
        yield model, adapter
    finally:
        hook(model, adapter)


def agree(one, other, vocab_size, steps=3):
    """Logits of a prompt and of a few tokens after it."""
    ids = np.random.default_rng(0).integers(vocab_size, size=(2, PROMPT))
    pasts = [None, None]
    for _ in range(steps):
        logits = []
        for i, side in enumerate((one, other)):
            found, pasts[i] = side.call(ids, pasts[i])
            logits.append(np.asarray(found))
        assert logits[0].shape == (2, vocab_size)
        assert np.abs(logits[0] - logits[1]).max() < TOLERANCE
        ids = other.choose(logits[1])
        assert (one.choose(torch.from_numpy(logits[0])) == ids).all()
    return logits[1]


@pytest.mark.slow
def test_base_and_memory_match_pytorch(message_export, tmp_path):
    setting = Setting("adapter", models=(BASE, MEMORY), runtimes=(PYTORCH, ONNX), prompts=(PROMPT,), decode=3)
    messages = []
    with apart(message_export.model) as (model, adapter):
        export = (message_export.folder, message_export.manifest)
        graphs = write_graphs(model, adapter, setting, export, tmp_path, messages.append)
        assert messages == ["exporting base"] and graphs[MEMORY].folder == message_export.folder
        last = {}
        for name, side in torch_sides(model, adapter, setting).items():
            graph = OnnxSide(graphs[name], "cpu", 1)
            last[name] = agree(side, graph, graphs[name].interface.vocab_size)
    assert np.abs(last[BASE] - last[MEMORY]).max() > 10 * TOLERANCE


def test_a_lora_in_buffers_of_fixed_length_matches_pytorch(static_export, tmp_path):
    options, interface = CallOptions(static_export.model, "last"), without_memory(static_export.manifest.interface)
    ids = torch.arange(9)[None]
    with apart(static_export.model) as (model, adapter), torch.no_grad():
        lora = random_lora(shared_copy(model), adapter, seed=0).eval()
        expected = lora(ids).logits[:, -1:]
        write_plain(lora.get_base_model(), options, interface, TARGETS["cpu"], tmp_path / "lora")
    graph = open_graph(tmp_path / "lora", interface)
    past = graph.empty_past(1)
    for tokens, columns in ((slice(0, 6), 6), (slice(6, 9), 9)):
        new, mask = ids[:, tokens].numpy(), np.ones((1, columns), np.int64)
        logits, past = graph.step(new, mask, np.ones(new.shape, np.bool_), past)
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)
    shapes = {tuple(value.shape()) for value in past.lease.buffers.cache.values()}
    assert {shape[2] for shape in shapes} == {interface.max_length}


def test_the_peak_memory_grows_with_the_prompt(qwen3):
    """Measured in its own process, independent of this one's size."""
    batch, prompts, interface = 16, (8, 408), qwen3.manifest.interface
    setting = Setting("adapter", prompts=prompts, decode=1, batch_size=batch, threads=1, runtimes=(ONNX,))
    peak = peak_of(setting, ONNX, MEMORY, GraphFolder(qwen3.folder, interface))
    of_token = sum(4 * heads * width for layer in interface.layers for heads, width in layer.cache.values())
    held = batch * (prompts[1] - prompts[0]) * of_token
    assert held < peak.by_prompt[prompts[1]] - peak.by_prompt[prompts[0]]
    assert peak.imports < 200e6, "it has imported PyTorch"


def test_an_export_of_another_adapter_raises(qwen3, static_export, monkeypatch):
    setting = Setting("adapter", runtimes=(ONNX,), prompts=(64,), decode=16)
    own = qwen3.manifest.adapter
    assert read_export(setting, str(qwen3.folder), own) == (qwen3.folder, qwen3.manifest)
    with pytest.raises(ExportError, match="another adapter"):
        read_export(setting, str(qwen3.folder), "0" * 64)
    with pytest.raises(ExportError, match="has dtype float32, but --dtype is float16"):
        read_export(dataclasses.replace(setting, dtype="float16"), str(qwen3.folder), own)
    longer = dataclasses.replace(setting, prompts=(100,))
    with pytest.raises(ConfigError, match="has room for 112"):
        read_export(longer, str(static_export.folder), static_export.manifest.adapter)
    for change, error in (
        ({"interface": dataclasses.replace(qwen3.manifest.interface, genai=True)}, "onnxruntime-genai"),
        ({"quantize": "int8", "quantization": Quantization(8, 32, True)}, "is quantised"),
    ):
        changed = dataclasses.replace(qwen3.manifest, **change)
        monkeypatch.setattr(Manifest, "read", lambda folder, changed=changed: changed)
        with pytest.raises((ExportError, ConfigError), match=error):
            read_export(setting, str(qwen3.folder), own)
    alone = dataclasses.replace(setting, models=(BASE, MEMORY))
    assert read_export(alone, str(qwen3.folder), own)[1].quantize == "int8"
    older = dataclasses.replace(qwen3.manifest, quantize="int8")
    monkeypatch.setattr(Manifest, "read", lambda folder: older)
    with pytest.raises(ExportError, match="quantised by an older version"):
        read_export(alone, str(qwen3.folder), own)

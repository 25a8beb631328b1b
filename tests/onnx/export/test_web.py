"""Folders for onnxruntime-web, run by it under Node: its WebAssembly build, and WebGPU where there is a driver."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import onnx_ir
import pytest
import torch
from helpers.graph_runner import GraphRunner
from helpers.node import WebGraph, node_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

from deltamem_tool import DeltaMemConfig, attach
from deltamem_tool.errors import ExportError
from deltamem_tool.memory.call_options import CallOptions
from deltamem_tool.onnx.export import export, targets
from deltamem_tool.onnx.export.compare import largest_difference, run_in_onnx_runtime
from deltamem_tool.onnx.manifest import Manifest
from deltamem_tool.onnx.runtime.buffered_graph import open_graph

pytestmark = [pytest.mark.node, pytest.mark.slow]

SCRIPTS = Path(__file__).parents[1] / "web"
TOLERANCE = 1e-4  # of logits and states, over whole conversations


@pytest.fixture(scope="module")
def scripts(tmp_path_factory) -> Path:
    return node_folder(SCRIPTS, tmp_path_factory.mktemp("node") / "scripts")


@pytest.fixture
def open_in_onnxruntime_web(scripts) -> Iterator[Callable[..., GraphRunner]]:
    """Opens a folder's graph in onnxruntime-web."""
    opened: list[WebGraph] = []

    def open_in_web(folder: Path, provider: str = "wasm") -> GraphRunner:
        opened.append(WebGraph(scripts, folder, provider))
        return GraphRunner(opened[-1], Manifest.read(folder).interface)

    yield open_in_web
    for graph in opened:
        graph.close()


@pytest.fixture
def web_export(exported_with):
    return exported_with("web", {}, target="web")


def difference_from_pytorch(exported, graph: GraphRunner) -> float:
    return largest_difference(exported.model, graph, CallOptions(exported.model, exported.manifest.interface.logits))


def test_conversations_are_pytorchs(web_export, open_in_onnxruntime_web):
    """Covers an empty past, padding, single tokens, writes on, off and mixed, alone and in a batch."""
    assert web_export.manifest.target == "web"
    assert 0 < difference_from_pytorch(web_export, open_in_onnxruntime_web(web_export.folder)) < TOLERANCE


MECHANISMS = {
    "messages": {"granularity": "message", "couple_lambda": False},
    "sentences": {"granularity": "sentence"},
    "no_lambda": {"update_rule": "no_lambda"},
}


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_every_mechanism_has_its_operators(exported_with, open_in_onnxruntime_web, mechanism):
    exported = exported_with(f"web_{mechanism}", MECHANISMS[mechanism], target="web")
    assert 0 < difference_from_pytorch(exported, open_in_onnxruntime_web(exported.folder)) < TOLERANCE


SMALL = {  # type, quantisation, and by how much logits may differ from those of ONNX Runtime's CPU provider
    "half": (torch.float16, "none", 1e-2),  # for logits up to 4, which are multiples of 1/256
    "int8": (torch.float32, "int8", 0.1),  # activations become int8, so another rounding is off by 1/127
    "int4": (torch.float32, "int4", 0.1),
}


@pytest.mark.parametrize("name", SMALL)
def test_small_weights_give_what_they_give_in_onnx_runtime(exported_with, open_in_onnxruntime_web, name):
    dtype, quantize, tolerance = SMALL[name]
    exported = exported_with(f"web_{name}", {}, dtype, target="web", quantize=quantize)
    graphs = (
        open_in_onnxruntime_web(exported.folder),
        open_graph(exported.folder, exported.manifest.interface, threads=1),
    )
    for results in zip(*(run_in_onnx_runtime(exported.model, graph).results for graph in graphs), strict=True):
        (logits, states, _), (expected, expected_states, _) = results
        torch.testing.assert_close(logits, expected, rtol=0, atol=tolerance)
        torch.testing.assert_close(states, expected_states, rtol=0, atol=TOLERANCE)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("mechanism", [None, "messages"])
def test_conversations_are_pytorchs_on_webgpu(exported_with, open_in_onnxruntime_web, mechanism):
    """Takes minutes on a CPU, for example with SwiftShader, which browsers include (`VK_ICD_FILENAMES`)."""
    options = MECHANISMS[mechanism] if mechanism else {}
    exported = exported_with(f"web_{mechanism}" if mechanism else "web", options, target="web")
    assert 0 < difference_from_pytorch(exported, open_in_onnxruntime_web(exported.folder, "webgpu")) < TOLERANCE


def test_queries_and_keys_have_three_axes_before_their_norms(exported_with):
    """ONNX Runtime fuses the norms with attention on WebGPU and CUDA, and uses the norms' inputs as queries."""
    exported = exported_with("web_messages", MECHANISMS["messages"], target="web")
    graph = onnx_ir.load(exported.folder / "model.onnx").graph
    (attention,) = (node for node in graph if node.op_type == "GroupQueryAttention")
    for merged in attention.inputs[:2]:
        norm = merged.producer().inputs[0].producer()
        split = norm.inputs[0].producer()
        assert (norm.op_type, split.op_type) == ("SimplifiedLayerNormalization", "Reshape")
        assert len(split.inputs[0].shape) == 3


@pytest.mark.real_model
def test_smollm2(smollm2, open_in_onnxruntime_web, tmp_path):
    """SmolLM2 with a memory in each of its 30 layers."""
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    torch.manual_seed(0)
    for parameter in attach(model, DeltaMemConfig(branches=("q", "o"))).parameters():
        torch.nn.init.normal_(parameter, std=0.01)  # as large as trained ones
    export.export_onnx(model, AutoTokenizer.from_pretrained(smollm2), tmp_path / "out", target="web")
    difference = largest_difference(model, open_in_onnxruntime_web(tmp_path / "out"), CallOptions(model, "last"))
    assert 0 < difference < TOLERANCE


def test_weights_that_no_browser_holds_are_refused_before_any_work(web_export, monkeypatch, tmp_path):
    monkeypatch.setitem(targets.TARGETS, "web", replace(targets.TARGETS["web"], max_bytes=10_000))
    with pytest.raises(ExportError, match=r"(?s)too large for the target web.*--quantize"):
        export.export_onnx(web_export.model, web_export.tokenizer, tmp_path / "out", target="web")
    assert list(tmp_path.iterdir()) == []

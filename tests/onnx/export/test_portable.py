"""Graphs of standard ONNX operators, in two independent runtimes, compared with PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import openvino
import pytest
import torch
from helpers.graph_runner import GraphRunner, Run
from helpers.scan_inputs import make_inputs
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.export import Dim

from deltamem_tool.chat.conversation import Conversation
from deltamem_tool.chat.sampling import Sampling
from deltamem_tool.errors import ExportError
from deltamem_tool.memory.call_options import CallOptions
from deltamem_tool.onnx import contract
from deltamem_tool.onnx.export import export
from deltamem_tool.onnx.export.compare import largest_difference
from deltamem_tool.onnx.export.portable import check_file, require_standard
from deltamem_tool.onnx.export.targets import PORTABLE_OPSET
from deltamem_tool.onnx.runtime.engine import OnnxModel
from deltamem_tool.ops.naive import naive_scan
from deltamem_tool.ops.scan import delta_scan, use_implementation
from deltamem_tool.ops.segment_sums import cumulative_sums, segment_sums

TOLERANCE = 1e-4  # of logits and states, over whole conversations
SCAN_TOLERANCE = 2e-6  # for the scan alone, whose numbers are of order 1
SUMS_TOLERANCE = 2e-6  # relative: float32 sums of 100 tokens, where PyTorch's are float64

RESULTS = ("of_tokens", "afterwards")  # in the scan and the sums


def in_onnxruntime(file: Path) -> Run:
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda feed: dict(zip(names, session.run(names, feed), strict=True))


def in_openvino(file: Path) -> Run:
    # Without the hint, it computes in bfloat16 on CPUs that support it.
    options = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(file, "CPU", options)
    names = [output.any_name for output in compiled.outputs]

    def run(feed: dict[str, NDArray]) -> dict[str, NDArray]:
        outputs = compiled(feed)
        return {name: outputs[name].copy() for name in names}

    return run


RUNTIMES = {"onnxruntime": in_onnxruntime, "openvino": in_openvino}


@pytest.fixture(scope="module", params=RUNTIMES)
def runtime(request) -> Callable[[Path], Run]:
    return RUNTIMES[request.param]


def test_conversations_match_pytorch(portable_export, runtime):
    """Covers an empty past, padding, single tokens, writes on, off and mixed, alone and in a batch."""
    runner = GraphRunner(runtime(portable_export.folder / contract.MODEL_FILE), portable_export.manifest.interface)
    difference = largest_difference(portable_export.model, runner, CallOptions(portable_export.model, "last"))
    assert 0 < difference < TOLERANCE


def test_the_portable_graph_gives_the_same_answer_as_the_fused_one(portable_export, static_export):
    assert portable_export.manifest.target == "portable"
    actual, expected = (
        Conversation(OnnxModel(model.folder)).generate("Hello", Sampling(8))
        for model in (portable_export, static_export)
    )
    assert actual.tokens == expected.tokens


def test_every_operator_is_standard(portable_export):
    model = onnx_ir.load(portable_export.folder / contract.MODEL_FILE)
    assert model.opset_imports == {"": PORTABLE_OPSET} and not model.functions
    operators = [(node.domain, node.op_type) for graph in model.graphs() for node in graph]
    assert {domain for domain, _ in operators} == {""}
    assert operators.count(("", "Scan")) == 1  # of its one layer
    onnx.checker.check_model(portable_export.folder / contract.MODEL_FILE, full_check=True)


def test_the_opset_is_released():
    newest = onnx.defs.onnx_opset_version()  # which may not be final
    released = [opset for _, _, opset, *_ in onnx.helper.VERSION_TABLE if opset < newest]
    assert PORTABLE_OPSET in released


class Scan(nn.Module):
    def forward(self, q, k, v, log_keep, erase, write, state):
        return delta_scan(q, k, v, log_keep, erase, write, state)


class Sums(nn.Module):
    def forward(self, x, last, carried):
        return segment_sums(x, last, carried)


def written(module: nn.Module, inputs: tuple[Tensor, ...], file: Path) -> Path:
    """The graph of `module`, for any batch and length. The last input is the state of a conversation."""
    batch, tokens = Dim("batch"), Dim("tokens")
    axes = (*({0: batch, 1: tokens} for _ in inputs[1:]), {0: batch})
    with torch.no_grad(), use_implementation("portable"):
        program = torch.onnx.export(
            module.eval(),
            inputs,
            dynamo=True,
            dynamic_shapes=axes,
            opset_version=PORTABLE_OPSET,
            verbose=False,
            output_names=list(RESULTS),
        )
    program.save(file)
    return file


@pytest.fixture(scope="module")
def scan_file(tmp_path_factory) -> Path:
    return written(Scan(), scan_inputs("random", 3), tmp_path_factory.mktemp("scan") / "scan.onnx")


@pytest.fixture(scope="module")
def sums_file(tmp_path_factory) -> Path:
    return written(Sums(), sums_inputs(3), tmp_path_factory.mktemp("sums") / "sums.onnx")


@pytest.fixture(scope="module")
def scan(scan_file, runtime) -> Run:
    return runtime(scan_file)


@pytest.fixture(scope="module")
def sums(sums_file, runtime) -> Run:
    return runtime(sums_file)


def scan_inputs(kind: str, tokens: int) -> tuple[Tensor, ...]:
    """q … write `[B, T, H, R]` and a state; a third of the tokens is masked, save with open gates."""
    q, k, v, log_keep, erase, write, state = (x.detach() for x in make_inputs(tokens, masked=0.3, seed=tokens))
    if kind == "gates of 0 and 1":
        random = torch.Generator().manual_seed(tokens)
        keep, erase, write = (torch.randint(2, q.shape, generator=random).float() for _ in range(3))
        log_keep = keep.log()  # 0 and -inf
    elif kind == "one key":
        k = k[:, :1].expand_as(k).contiguous()
        log_keep, erase, write = torch.zeros_like(q), torch.ones_like(q), torch.ones_like(q)
    return q, k, v, log_keep, erase, write, state


def sums_inputs(tokens: int) -> tuple[Tensor, ...]:
    random = torch.Generator().manual_seed(tokens)
    last = torch.rand(3, tokens, generator=random) < 0.2
    return torch.randn(3, tokens, 5, generator=random), last, torch.randn(3, 5, generator=random)


def named(file: Path, inputs: tuple[Tensor, ...]) -> dict[str, NDArray]:
    names = [value.name for value in onnx.load(file).graph.input]
    return dict(zip(names, (x.numpy() for x in inputs), strict=True))


@pytest.mark.parametrize("tokens", [1, 2, 63, 100])
@pytest.mark.parametrize("kind", ["random", "gates of 0 and 1", "one key"])
def test_the_scan_matches_a_token_loop(scan, scan_file, kind, tokens):
    inputs = scan_inputs(kind, tokens)
    actual = scan(named(scan_file, inputs))
    for name, expected in zip(RESULTS, naive_scan(*inputs), strict=True):
        np.testing.assert_allclose(actual[name], expected, rtol=0, atol=SCAN_TOLERANCE)


def test_masked_tokens_leave_the_state_bit_identical(scan, scan_file):
    q, k, v, *gates, state = scan_inputs("random", 5)
    nothing = [torch.zeros_like(gate) for gate in gates]
    assert np.array_equal(scan(named(scan_file, (q, k, v, *nothing, state)))[RESULTS[1]], state)


@pytest.mark.parametrize("tokens", [1, 2, 63, 100])
def test_sums_restart_after_every_segment(sums, sums_file, tokens):
    inputs = sums_inputs(tokens)
    actual = sums(named(sums_file, inputs))
    for name, expected in zip(RESULTS, cumulative_sums(*inputs), strict=True):
        np.testing.assert_allclose(actual[name], expected, rtol=SUMS_TOLERANCE, atol=SUMS_TOLERANCE)


@pytest.mark.parametrize("file", ["scan_file", "sums_file"])
def test_the_loops_use_standard_operators(file, request):
    file = request.getfixturevalue(file)
    onnx.checker.check_model(file, full_check=True)
    program = onnx_ir.load(file)
    require_standard(program, "it")
    assert [node.op_type for node in program.graph].count("Scan") == 1


def graph_of(text: str) -> onnx_ir.Model:
    return onnx_ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 18, "com.microsoft" : 1]> {text}')


FOREIGN = "g (float[2] x) => (float[2] y) { y = com.microsoft.Gelu (x) }"
FOREIGN_INSIDE = """g (float[2] s, float[3, 2] xs) => (float[2] t) {
    t = Scan <num_scan_inputs = 1, body = b (float[2] s0, float[2] x) => (float[2] y) {
        z = com.microsoft.Gelu (x) y = Add (s0, z)
    }> (s, xs)
}"""


DISGUISED = "g (float[2] x, float[2] w) => (float[2] y) { y = SimplifiedLayerNormalization (x, w) }"
TOO_NEW = "g (float[2] x) => (float[2] y) { y = Gelu (x) }"  # since opset 20


@pytest.mark.parametrize(
    ("text", "operator"),
    [
        (FOREIGN, "com.microsoft::Gelu"),
        (FOREIGN_INSIDE, "com.microsoft::Gelu"),
        (DISGUISED, "ai.onnx::SimplifiedLayerNormalization"),
        (TOO_NEW, "ai.onnx::Gelu"),
    ],
)
def test_a_runtime_specific_operator_raises(text, operator):
    with pytest.raises(ExportError, match=f"(?s)SomeModel.*{operator}, which opset 18 does not have"):
        require_standard(graph_of(text), "SomeModel")


def test_unused_operator_domains_are_removed():
    program = graph_of("g (float[2] x) => (float[2] y) { y = Relu (x) }")
    require_standard(program, "it")
    assert program.opset_imports == {"": 18}


def test_a_rejected_export_leaves_nothing(portable_export, monkeypatch, tmp_path):
    monkeypatch.setattr(export, "trace_model", lambda *args: graph_of(FOREIGN))
    with pytest.raises(ExportError, match="Qwen3ForCausalLM cannot be written in standard ONNX operators"):
        export.export_onnx(portable_export.model, portable_export.tokenizer, tmp_path / "out", target="portable")
    monkeypatch.setattr(
        export, "trace_model", lambda *args: graph_of("g (float[2] x) => (float[3] y) { y = Relu (x) }")
    )
    with pytest.raises(ExportError, match="not valid ONNX"):
        export.export_onnx(portable_export.model, portable_export.tokenizer, tmp_path / "out", target="portable")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["y = Relu (x)", "y = Relo (x)"])
def test_a_file_rejected_by_the_onnx_checker_raises(text, tmp_path):
    onnx_ir.save(graph_of(f"g (float[2] x) => (float[3] y) {{ {text} }}"), tmp_path / "bad.onnx")
    with pytest.raises(ExportError, match="not valid ONNX"):
        check_file(tmp_path / "bad.onnx")

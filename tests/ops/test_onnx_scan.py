"""ONNX Runtime's LinearAttention operator, with the inputs that the export gives it, against `naive_scan`."""

from __future__ import annotations

import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch.export import Dim

from deltamem_tool.ops.naive import naive_scan
from deltamem_tool.ops.scan import delta_scan, use_implementation

TOLERANCE = 2e-6


class Scan(torch.nn.Module):
    def forward(self, q, k, v, log_keep, erase, write, state):
        return delta_scan(q, k, v, log_keep, erase, write, state)


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    """The scan alone, for any batch and length; H = 2, R = 4."""
    file = tmp_path_factory.mktemp("scan") / "scan.onnx"
    batch, tokens = Dim("batch"), Dim("tokens")
    axes = (*tuple({0: batch, 1: tokens} for _ in range(6)), {0: batch})
    with use_implementation("onnx"):
        program = torch.onnx.export(
            Scan().eval(), arguments("standard", 2, 3), dynamo=True, dynamic_shapes=axes, verbose=False
        )
    program.save(file)
    return file


def arguments(rule: str, batch: int, tokens: int, scale: float = 2.0):
    """q … write `[B, T, H, R]` and a state; a third of the tokens is masked. `scale` stretches the gates."""
    random = torch.Generator().manual_seed(tokens)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random)

    q, k = (F.normalize(normal(batch, tokens, 2, 4), dim=-1) for _ in range(2))
    v, z = normal(batch, tokens, 2, 4), normal(batch, tokens, 2, 4) * scale
    beta = torch.sigmoid(z)
    log_keep = torch.zeros_like(z) if rule == "no_lambda" else F.logsigmoid(-z)
    erase = beta * torch.sigmoid(-z) if rule == "lambda_outside" else beta
    valid = (torch.rand(batch, tokens, 1, 1, generator=random) > 0.3).float()
    return q, k, v, log_keep * valid, erase * valid, beta * valid, normal(batch, 2, 4, 4)


def run(session: onnxruntime.InferenceSession, inputs) -> list[torch.Tensor]:
    feed = {i.name: x.numpy() for i, x in zip(session.get_inputs(), inputs, strict=True)}
    return [torch.from_numpy(x) for x in session.run(None, feed)]


@pytest.fixture(scope="module")
def session(graph):
    return onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])


def test_the_scan_exports_to_one_onnx_runtime_operator(graph):
    operators = [(node.domain, node.op_type) for node in onnx.load(graph).graph.node]
    assert operators.count(("com.microsoft", "LinearAttention")) == 1
    assert not {"Loop", "Scan"} & {name for _, name in operators}


@pytest.mark.parametrize("scale", [2.0, 200.0])  # 200: λ underflows, and e^z overflows
@pytest.mark.parametrize("tokens", [1, 5, 64, 130])
@pytest.mark.parametrize("rule", ["standard", "lambda_outside", "no_lambda"])
def test_the_exported_scan_matches_naive_scan(session, rule, tokens, scale):
    inputs = arguments(rule, 3, tokens, scale)
    reads, state = run(session, inputs)
    expected_reads, expected_state = naive_scan(*inputs)
    torch.testing.assert_close(reads, expected_reads, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(state, expected_state, rtol=0, atol=TOLERANCE)


def test_masked_tokens_leave_the_state_bit_identical(session):
    *tokens, state = arguments("standard", 2, 5)
    state[0, 0, 0] = 0.0
    tokens[3:] = [torch.zeros_like(gate) for gate in tokens[3:]]
    assert torch.equal(run(session, [*tokens, state])[1], state)


def test_a_key_can_be_written_without_erasing(session):
    *tokens, state = arguments("no_lambda", 2, 5)
    tokens[4] = torch.zeros_like(tokens[4])
    expected = naive_scan(*tokens, state)[1]
    torch.testing.assert_close(run(session, [*tokens, state])[1], expected, rtol=0, atol=TOLERANCE)


def test_the_scan_implementation_is_restored_after_the_block(monkeypatch):
    inputs = arguments("standard", 1, 3)
    expected = naive_scan(*inputs)[1]
    with use_implementation("onnx"):
        traced = delta_scan(*inputs)[1]
    assert not torch.equal(traced, expected)  # outside an export, the operator computes nothing
    torch.testing.assert_close(delta_scan(*inputs)[1], expected, rtol=0, atol=TOLERANCE)

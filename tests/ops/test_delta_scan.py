import itertools

import numpy as np
import pytest
import torch
from helpers.scan_inputs import NAMES, RULES, make_inputs
from torch import Tensor

from deltamem_tool.ops import chunked
from deltamem_tool.ops.scan import delta_scan

# float32 against float32, largest absolute difference; reads, states and gradients are of order 1 to 10.
TOLERANCE = 2e-5
# Identical keys with no decay: every write hits the same slot, errors add up over T = 1,000.
WORST_CASE_TOLERANCE = 1e-4
# float64 against float64: only a wrong equation is visible here.
FLOAT64_TOLERANCE = 1e-11


def run_with_gradients(inputs, implementation):
    """Reads, final state and every gradient of a scalar that weighs each output differently."""
    reads, state = delta_scan(*inputs, implementation=implementation)
    generator = torch.Generator().manual_seed(1)
    loss = sum((x * torch.randn(x.shape, generator=generator).to(x.dtype)).sum() for x in (reads, state))
    gradients = torch.autograd.grad(loss, inputs)
    return {"reads": reads, "final state": state} | {f"d/d{n}": g for n, g in zip(NAMES, gradients, strict=True)}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float):
    for name, value in expected.items():
        assert torch.isfinite(value).all(), f"{name}: the expected value is not finite"
        torch.testing.assert_close(
            actual[name], value, atol=tolerance, rtol=tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )


def double_loop(q, k, v, log_keep, erase, write, state):
    """The equation on single numbers, in numpy float64."""
    batch, tokens, heads, rank = q.shape
    state, reads = state.copy(), np.zeros(q.shape)
    for b, h in itertools.product(range(batch), range(heads)):
        s = state[b, h]
        for t in range(tokens):
            before = s.copy()
            for i in range(rank):
                predicted = sum(before[i, j] * k[b, t, h, j] for j in range(rank))
                for j in range(rank):
                    reads[b, t, h, i] += before[i, j] * q[b, t, h, j]
                    s[i, j] = (
                        np.exp(log_keep[b, t, h, i]) * before[i, j]
                        - erase[b, t, h, i] * predicted * k[b, t, h, j]
                        + write[b, t, h, i] * v[b, t, h, i] * k[b, t, h, j]
                    )
    return reads, state


@pytest.mark.parametrize("implementation", ["naive", "recurrent", "chunked"])
@pytest.mark.parametrize("rule", RULES)
def test_matches_a_scalar_loop_over_the_equation(rule, implementation):
    inputs = make_inputs(7, rule, rank=3, masked=0.3, dtype=torch.float64)
    reads, state = delta_scan(*inputs, implementation=implementation)
    expected_reads, expected_state = double_loop(*(x.detach().numpy() for x in inputs))
    np.testing.assert_allclose(reads.detach().numpy(), expected_reads, atol=FLOAT64_TOLERANCE)
    np.testing.assert_allclose(state.detach().numpy(), expected_state, atol=FLOAT64_TOLERANCE)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("tokens", [1, 31, 32, 33, 63, 64, 100, 1000])
@pytest.mark.parametrize("implementation", ["recurrent", "chunked"])
def test_matches_naive_scan(tokens, rule, implementation):
    inputs = make_inputs(tokens, rule, masked=0.3)
    assert_same(run_with_gradients(inputs, implementation), run_with_gradients(inputs, "naive"), TOLERANCE)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("implementation", ["recurrent", "chunked"])
def test_matches_naive_scan_in_float64(rule, implementation):
    inputs = make_inputs(100, rule, masked=0.3, dtype=torch.float64)
    assert_same(run_with_gradients(inputs, implementation), run_with_gradients(inputs, "naive"), FLOAT64_TOLERANCE)


def test_recomputing_the_scan_changes_nothing_and_saves_memory(monkeypatch):
    inputs = make_inputs(tokens=200)
    usual = run_with_gradients(inputs, "chunked")
    monkeypatch.setattr(chunked, "RECOMPUTED", 0)
    again = run_with_gradients(inputs, "chunked")
    assert all(torch.equal(again[name], value) for name, value in usual.items())
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        delta_scan(*(x.clone().requires_grad_() for x in inputs), implementation="chunked")
    assert sum(kept) == sum(x.numel() for x in inputs), "what it starts from, and nothing else"


def test_parallel_and_sequential_state_passing_agree(monkeypatch):
    inputs = make_inputs(1000, "lambda_outside", masked=0.3)
    expected = run_with_gradients(inputs, "chunked")
    monkeypatch.setattr(chunked, "_sequential_states", chunked._parallel_states)
    assert_same(run_with_gradients(inputs, "chunked"), expected, TOLERANCE)


@pytest.mark.parametrize("implementation", ["recurrent", "chunked"])
def test_identical_keys_without_decay(implementation):
    inputs = make_inputs(1000, "no_lambda")
    with torch.no_grad():
        inputs[1].copy_(inputs[1][:, :1].clone().expand_as(inputs[1]))
    assert_same(run_with_gradients(inputs, implementation), run_with_gradients(inputs, "naive"), WORST_CASE_TOLERANCE)


@pytest.mark.parametrize(
    "log_keep",
    [
        pytest.param(lambda x: torch.full_like(x, -100.0), id="all forgotten"),
        pytest.param(lambda x: torch.where(torch.arange(x.shape[1]).view(1, -1, 1, 1) % 3 == 0, -100.0, x), id="some"),
        pytest.param(lambda x: torch.full_like(x, -4.0), id="decays below float32's smallest number"),
        pytest.param(lambda x: torch.full_like(x, -1e-7), id="nearly all kept"),
    ],
)
@pytest.mark.parametrize("implementation", ["recurrent", "chunked"])
def test_extreme_gates(log_keep, implementation):
    inputs = make_inputs(300, "standard")
    with torch.no_grad():
        inputs[3].copy_(log_keep(inputs[3]))
    assert_same(run_with_gradients(inputs, implementation), run_with_gradients(inputs, "naive"), TOLERANCE)


@pytest.mark.parametrize("implementation", ["naive", "recurrent", "chunked"])
def test_gradcheck(implementation, monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK", 2)
    inputs = make_inputs(5, "lambda_outside", batch=1, heads=2, rank=2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *x: delta_scan(*x, implementation=implementation), inputs)


@pytest.mark.parametrize("implementation", ["naive", "recurrent", "chunked"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_inputs_are_computed_in_float32(dtype, implementation):
    low = make_inputs(100, dtype=dtype)
    outputs = delta_scan(*low, implementation=implementation)
    expected = delta_scan(*(x.float() for x in low), implementation=implementation)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = delta_scan(*low, implementation=implementation)
    for actual, cast, reference in zip(outputs, under_autocast, expected, strict=True):
        assert actual.dtype == torch.float32
        assert torch.equal(actual, reference)
        assert torch.equal(cast, reference)


@pytest.mark.parametrize("implementation", [None, "naive", "recurrent", "chunked"])
def test_a_call_without_tokens_returns_the_initial_state(implementation):
    inputs = make_inputs(0)
    reads, state = delta_scan(*inputs, implementation=implementation)
    assert reads.shape == (2, 0, 2, 8)
    assert torch.equal(state, inputs[-1])


@pytest.mark.parametrize("implementation", ["naive", "recurrent", "chunked"])
def test_masked_tokens_leave_the_state_unchanged(implementation):
    inputs = make_inputs(50, masked=1.0)
    _, state = delta_scan(*inputs, implementation=implementation)
    assert torch.equal(state, inputs[-1])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_splitting_a_call_changes_nothing(seed):
    *tokens, state = (x.detach() for x in make_inputs(300, masked=0.2, seed=seed))
    expected_reads, expected_state = delta_scan(*tokens, state)
    cuts = torch.randint(0, 301, (6,), generator=torch.Generator().manual_seed(seed)).sort().values.tolist()
    reads = []
    for start, stop in itertools.pairwise([0, *cuts, 300]):
        part, state = delta_scan(*(x[:, start:stop] for x in tokens), state)
        reads.append(part)
    torch.testing.assert_close(torch.cat(reads, dim=1), expected_reads, atol=TOLERANCE, rtol=TOLERANCE)
    torch.testing.assert_close(state, expected_state, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("implementation", ["recurrent", "chunked"])
def test_the_inputs_are_not_modified(implementation):
    inputs = make_inputs(100)
    copies = [x.detach().clone() for x in inputs]
    run_with_gradients(inputs, implementation)
    assert all(torch.equal(x, copy) for x, copy in zip(inputs, copies, strict=True))


@pytest.mark.parametrize("name", NAMES[1:])
def test_a_wrong_shape_is_named_in_the_error(name):
    inputs = dict(zip(NAMES, make_inputs(5), strict=True))
    inputs[name] = inputs[name][..., :1]
    with pytest.raises(ValueError, match=rf"^{name} must"):
        delta_scan(**inputs)


def test_wrong_dimensions_and_unknown_implementations_raise():
    inputs = make_inputs(5)
    with pytest.raises(ValueError, match=r"q must be \[B, T, H, R\]"):
        delta_scan(*(x[0] for x in inputs))
    with pytest.raises(ValueError, match=r"implementation must be one of .*'fast'"):
        delta_scan(*inputs, implementation="fast")


class Scan(torch.nn.Module):
    def forward(self, q, k, v, log_keep, erase, write, state):
        return delta_scan(q, k, v, log_keep, erase, write, state)


def test_export_with_dynamic_batch_and_tokens():
    batch, tokens = torch.export.Dim("batch"), torch.export.Dim("tokens")
    shapes = {name: {0: batch, 1: tokens} for name in NAMES[:-1]} | {"state": {0: batch}}
    example = tuple(x.detach() for x in make_inputs(40))
    program = torch.export.export(Scan(), example, dynamic_shapes=shapes).module()
    for size, length in [(1, 1), (3, 32), (2, 33), (5, 100), (2, 1000)]:
        inputs = [x.detach() for x in make_inputs(length, batch=size, masked=0.2, seed=length)]
        expected = delta_scan(*inputs, implementation="naive")
        for actual, reference in zip(program(*inputs), expected, strict=True):
            torch.testing.assert_close(actual, reference, atol=TOLERANCE, rtol=TOLERANCE)

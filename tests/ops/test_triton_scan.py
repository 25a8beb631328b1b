"""The CUDA kernels against the equation: on a GPU if there is one, else through Triton's interpreter on the CPU."""

import os
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import pytest
import torch
from helpers import scan_inputs
from helpers.scan_inputs import NAMES
from torch.autograd.functional import vjp

from deltamem_tool.errors import ConfigError
from deltamem_tool.ops.scan import delta_scan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# float32 against float32, largest absolute difference; reads, states and gradients are of order 1 to 10.
TOLERANCE = 2e-5
# float64 against float64: only a wrong equation is visible here.
FLOAT64_TOLERANCE = 1e-11

triton_scan = partial(delta_scan, implementation="triton")
naive_scan = partial(delta_scan, implementation="naive")


@pytest.fixture(scope="module")
def run():
    """`run(function, *arguments)`, in a process that can run the kernels. Arguments and results are on `DEVICE`.

    The interpreter needs a process of its own: Triton looks at the variable when it is imported, which an earlier test
    may have caused, and a later one may not want.
    """
    pytest.importorskip("triton")
    if DEVICE == "cuda":
        yield lambda function, *arguments: function(*arguments)
        return
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            assert process.submit(os.getenv, "TRITON_INTERPRET").result() == "1"  # starts the process
        yield lambda function, *arguments: process.submit(function, *arguments).result()


def make_inputs(tokens, rule="standard", *, batch=1, heads=1, masked=0.3, **options):
    """The inputs of `delta_scan`, and weights of the reads and of the final state in a loss."""
    inputs = scan_inputs.make_inputs(tokens, rule, batch=batch, heads=heads, masked=masked, seed=tokens, **options)
    inputs = tuple(x.detach().to(DEVICE) for x in inputs)
    generator = torch.Generator().manual_seed(tokens + 1)
    like = (inputs[0], inputs[-1])
    return inputs, tuple(torch.randn(x.shape, generator=generator, dtype=x.dtype).to(DEVICE) for x in like)


def assert_same(actual, expected, tolerance):
    """Both as `vjp` gives them: (reads, state), gradients."""
    names = ("reads", "final state", *(f"d/d{name}" for name in NAMES))
    for name, a, b in zip(names, (*actual[0], *actual[1]), (*expected[0], *expected[1]), strict=True):
        assert torch.isfinite(b).all(), f"{name}: the expected value is not finite"
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize(
    ("tokens", "rule", "size"),
    [
        (1, "standard", {"rank": 1}),
        (1, "lambda_outside", {"batch": 2, "heads": 3, "rank": 8}),
        (2, "no_lambda", {"heads": 2, "rank": 3}),
        (2, "standard", {"rank": 33}),
        (2, "lambda_outside", {"rank": 64}),
        (33, "standard", {"rank": 3}),
        (33, "no_lambda", {"rank": 16}),
        (100, "lambda_outside", {"rank": 8}),
    ],
)
def test_matches_naive_scan(run, tokens, rule, size):
    inputs, weights = make_inputs(tokens, rule, **size)
    assert_same(run(vjp, triton_scan, inputs, weights), vjp(naive_scan, inputs, weights), TOLERANCE)


@pytest.mark.parametrize("rule", ["standard", "lambda_outside", "no_lambda"])
def test_matches_naive_scan_in_float64(run, rule):
    inputs, weights = make_inputs(5, rule, batch=2, heads=2, rank=3, dtype=torch.float64)
    assert_same(run(vjp, triton_scan, inputs, weights), vjp(naive_scan, inputs, weights), FLOAT64_TOLERANCE)


def test_inputs_and_gradients_may_have_any_strides(run):
    """Covers permuted memory, slices and expanded scalars."""
    inputs, weights = make_inputs(3, batch=2, heads=2, rank=4)
    inputs, weights = (tuple(x.transpose(1, -1).contiguous().transpose(1, -1) for x in p) for p in (inputs, weights))
    q, k, v, log_keep, *rest = inputs
    inputs = (q, torch.cat([k, k], -1)[..., 4:], v, log_keep[:, :1, :1, :1].expand(log_keep.shape), *rest)
    weights = (weights[0][:1, :1, :1, :1].expand(weights[0].shape), weights[1])
    assert not any(x.is_contiguous() for x in (*inputs, *weights))
    assert_same(run(vjp, triton_scan, inputs, weights), vjp(naive_scan, inputs, weights), TOLERANCE)


def test_the_kernel_without_gradients_matches_naive_scan(run):
    """Covers the kernel that does not keep states."""
    inputs, _ = make_inputs(4, batch=2, heads=2, rank=3)
    for actual, expected in zip(run(triton_scan, *inputs), naive_scan(*inputs), strict=True):
        torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=TOLERANCE)


def test_masked_tokens_leave_the_state_unchanged(run):
    inputs, _ = make_inputs(4, masked=1.0)
    _, state = run(triton_scan, *inputs)
    assert torch.equal(state, inputs[-1])


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter takes tensors on a CPU")
def test_tensors_on_a_cpu_raise():
    pytest.importorskip("triton")
    inputs, _ = make_inputs(2)
    with pytest.raises(ConfigError, match="every tensor on one CUDA device, and these are on cpu"):
        triton_scan(*(x.cpu() for x in inputs))


def test_without_triton_raises(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)  # makes importing it fail
    monkeypatch.delitem(sys.modules, "deltamem_tool.ops.triton_scan", raising=False)
    inputs, _ = make_inputs(2)
    with pytest.raises(ConfigError, match="Triton cannot be imported"):
        triton_scan(*inputs)

"""Running sums that restart after every segment, against two scalar loops."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.autograd import gradcheck

from deltamem_tool.ops.segment_sums import segment_sums

# float64 against float64: only a wrong sum is visible here. The sums are of order 10.
FLOAT64_TOLERANCE = 1e-12
# float32 against float64, relative to the size of the segment's own sum: one rounding of the result.
ROUNDING = 2e-7
# The same with one token per call: one rounding per token, over 2,000 tokens.
ROUNDINGS = 1e-5


def make_inputs(batch=3, tokens=12, width=2, *, ends=0.3, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, tokens, width, generator=generator, dtype=torch.float64)
    last = torch.rand(batch, tokens, generator=generator) < ends
    return x.to(dtype), last, torch.randn(batch, width, generator=generator, dtype=torch.float64).to(dtype)


def two_loops(x, last, carried):
    """The sums and the open segment at the end, in Python floats."""
    sums, opened = [], []
    for tokens, ends, gathered in zip(x.tolist(), last.tolist(), carried.tolist(), strict=True):
        sums.append([])
        for token, end in zip(tokens, ends, strict=True):
            gathered = [before + new for before, new in zip(gathered, token, strict=True)]
            sums[-1].append(gathered)
            if end:
                gathered = [0.0] * len(gathered)
        opened.append(gathered)
    return torch.tensor(sums, dtype=torch.float64).view(x.shape), torch.tensor(opened, dtype=torch.float64)


def in_pieces(x, last, carried, bounds):
    pieces = []
    for a, b in itertools.pairwise(bounds):
        sums, carried = segment_sums(x[:, a:b], last[:, a:b], carried)
        pieces.append(sums)
    return torch.cat(pieces, dim=1), carried


def close(actual, expected, tolerance=FLOAT64_TOLERANCE):
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=0)


@pytest.mark.parametrize("ends", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("tokens", [0, 1, 2, 12])
@pytest.mark.parametrize("seed", range(3))
def test_matches_two_scalar_loops(tokens, ends, seed):
    inputs = make_inputs(tokens=tokens, ends=ends, seed=seed)
    close(segment_sums(*inputs), two_loops(*inputs))


@pytest.mark.parametrize("at", [0, 5, 10, 11])
def test_the_token_that_ends_a_segment_belongs_to_it(at):
    x, last, carried = torch.ones(1, 12, 1), torch.zeros(1, 12).bool(), torch.full((1, 1), 4.0)
    last[:, at] = True
    sums, opened = segment_sums(x, last, carried)
    assert sums[0, : at + 1, 0].tolist() == [5.0 + t for t in range(at + 1)]
    assert sums[0, at + 1 :, 0].tolist() == [1.0 + t for t in range(11 - at)]
    assert opened.item() == 11 - at


@pytest.mark.parametrize("tokens", [0, 1, 12])
def test_without_segment_ends_there_is_one_segment(tokens):
    x, last, carried = make_inputs(tokens=tokens, ends=0.0)
    assert not last.any()
    close(segment_sums(x, None, carried), two_loops(x, last, carried))


def test_rows_are_independent():
    x, last, carried = make_inputs()
    sums, opened = segment_sums(x, last, carried)
    for row in range(3):
        alone = segment_sums(x[row : row + 1], last[row : row + 1], carried[row : row + 1])
        close(alone, (sums[row : row + 1], opened[row : row + 1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_splitting_a_call_changes_nothing(dtype):
    x, last, carried = make_inputs(dtype=dtype)
    whole = segment_sums(x, last, carried)
    assert whole[0].dtype == whole[1].dtype == dtype
    tolerance = FLOAT64_TOLERANCE if dtype == torch.float64 else 10 * ROUNDING  # sums of order 10
    for cut in range(13):  # at 0 and at 12, one of the two pieces is empty
        close(in_pieces(x, last, carried, [0, cut, 12]), whole, tolerance)
    close(in_pieces(x, last, carried, range(13)), whole, tolerance)
    close(in_pieces(x, last, carried, [0, 3, 3, 4, 9, 12]), whole, tolerance)


@pytest.mark.parametrize("tokens", [1, 6])
@pytest.mark.parametrize("ends", [0.0, 0.4])
def test_gradients_match_finite_differences(tokens, ends):
    x, last, carried = make_inputs(2, tokens, ends=ends, seed=4)
    assert ends == 0 or tokens == 1 or last.any()
    assert gradcheck(lambda x, carried: segment_sums(x, last, carried), (x.requires_grad_(), carried.requires_grad_()))


def test_a_gradient_stays_within_its_segment():
    x, last, carried = torch.ones(1, 6, 1), torch.tensor([[0, 1, 0, 0, 1, 0]]).bool(), torch.ones(1, 1)
    x.requires_grad_(), carried.requires_grad_()
    sums, opened = segment_sums(x, last, carried)
    (of_x,) = torch.autograd.grad(sums[0, 4, 0], x, retain_graph=True)
    assert of_x.flatten().tolist() == [0, 0, 1, 1, 1, 0]
    of_x, of_carried = torch.autograd.grad(opened.sum() + 2 * sums[0, 1, 0], (x, carried))
    assert of_x.flatten().tolist() == [2, 2, 0, 0, 0, 1] and of_carried.item() == 2


def test_a_short_segment_after_a_long_one_is_precise():
    """10,000 tokens add up to 10⁷; then segments of 10 tokens add up to 10."""
    x, last, carried = make_inputs(2, 10_300, ends=0.0, dtype=torch.float32)
    x[:, :10_000] = (1 + 0.1 * x[:, :10_000]) * 1000
    x[:, 10_000:] = 1 + 0.1 * x[:, 10_000:]
    last[:, 9_999::10] = True
    sums, opened = segment_sums(x, last, carried)
    expected, rest = two_loops(x, last, carried)
    assert (expected[:, 9_999] > 9e6).all() and (expected[:, 10_000:] < 20).all()
    assert ((sums.double() - expected).abs() <= ROUNDING * expected.abs()).all()
    assert torch.equal(opened.double(), rest) and not rest.any()


def test_a_long_segment_token_by_token_is_precise():
    x, last, carried = make_inputs(2, 2_000, ends=0.0, dtype=torch.float32)
    x, carried = (1 + 0.1 * x) * 1000, carried.abs()
    sums, opened = in_pieces(x, last, carried, range(2_001))
    expected, rest = two_loops(x, last, carried)
    assert ((sums.double() - expected).abs() <= ROUNDINGS * expected).all()
    assert ((opened.double() - rest).abs() <= ROUNDINGS * rest).all()


@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_the_inputs_are_not_modified(tokens):
    inputs = make_inputs(tokens=tokens)
    copies = [tensor.clone() for tensor in inputs]
    segment_sums(*inputs)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(inputs, copies, strict=True))

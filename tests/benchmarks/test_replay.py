"""The basis of the predictions in `docs/capacity.md`, compared with the recurrence written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from replay import Writes, nearest, read, retained

BATCH, TOKENS, HEADS, RANK = 2, 8, 2, 3
CLOSE = {"atol": 1e-6, "rtol": 1e-5}
DRAWS = 10_000
FIVE_SIGMA = 5.0  # maximum deviation of a mean of draws


def some_writes(batch=BATCH, tokens=TOKENS, decays=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    k, v, *raw = torch.randn(5, batch, tokens, HEADS, RANK, generator=generator)
    keep = torch.sigmoid(raw[0] + 2) if decays else torch.ones_like(v)
    return Writes(F.normalize(k, dim=-1), v, keep.log(), torch.sigmoid(raw[1]), torch.sigmoid(raw[2]))


def naive(writes, valued=None):
    """The state of every row, by the matrix products in the equation."""
    batch, tokens, heads, rank = writes.k.shape
    states = torch.zeros(batch, heads, rank, rank, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for i in range(rank):
                row = torch.zeros(rank, dtype=torch.float64)
                for t in range(tokens):
                    k = writes.k[b, t, h].double()
                    keep, erase = writes.log_keep[b, t, h, i].double().exp(), writes.erase[b, t, h, i].double()
                    row = row @ (keep * torch.eye(rank, dtype=torch.float64) - erase * torch.outer(k, k))
                    if valued is None or valued[b, t]:
                        row = row + writes.write[b, t, h, i].double() * writes.v[b, t, h, i].double() * k
                states[b, h, i] = row
    return states.float()


def test_the_share_of_a_token_in_the_state_matches_the_recurrence():
    writes = some_writes()
    fact = torch.zeros(BATCH, TOKENS, dtype=torch.bool)
    fact[:, 2:4] = True
    fact[1, 6] = True
    torch.testing.assert_close(writes.state(), naive(writes), **CLOSE)
    torch.testing.assert_close(writes.only(fact).state(), naive(writes, fact), **CLOSE)
    torch.testing.assert_close(writes.only(fact).state() + writes.only(~fact).state(), writes.state(), **CLOSE)
    early = Writes(*(x[:, :4] for x in writes.all))
    first = torch.arange(TOKENS).expand(BATCH, -1) < 4
    torch.testing.assert_close(writes.until(first).state(), early.state(), **CLOSE)
    torch.testing.assert_close((early + Writes(*(x[:, 4:] for x in writes.all))).state(), writes.state(), **CLOSE)


@pytest.mark.parametrize("decays", [False, True])
def test_random_keys_leave_the_expected_share(decays):
    """Checks what is left of one association after writes with random keys, averaged over many draws."""
    one = some_writes(1, decays=decays)
    writes = Writes(*(x.expand(DRAWS, -1, -1, -1) for x in one.all))
    fact = (torch.arange(TOKENS) == 0).expand(DRAWS, -1)
    drawn = writes.with_random_keys(~fact, torch.Generator().manual_seed(1))
    assert torch.equal(drawn.k[:, 0], writes.k[:, 0]) and not torch.equal(drawn.k[0, 1:], drawn.k[1, 1:])
    left = read(drawn.only(fact).state(), writes.k[:, 0])  # asked with its own key: β v times what is left
    shares = left / (writes.write * writes.v)[:, 0]
    expected = one.expected_share(~fact[:1])[0]
    error = shares.std(0) / DRAWS**0.5
    assert ((shares.mean(0) - expected).abs() < FIVE_SIGMA * error).all()
    noise = read(drawn.only(~fact).state(), writes.k[:, 0]).square()
    keep, erase = one.log_keep.exp(), one.erase
    fades = keep.square() - (2 * keep * erase - erase.square()) / RANK
    since = torch.stack([fades[:, t + 1 :].prod(1) for t in range(TOKENS)], dim=1)
    variance = ((one.write * one.v).square() / RANK * since)[0, 1:].sum(0)
    assert ((noise.mean(0) - variance).abs() < FIVE_SIGMA * noise.std(0) / DRAWS**0.5).all()
    if not decays:  # (1 − β/R)ⁿ where all gates are one β
        same = Writes(one.k, one.v, one.log_keep, torch.full_like(one.v, 0.3), one.write)
        power = (1 - 0.3 / RANK) ** (TOKENS - 1)
        torch.testing.assert_close(same.expected_share(~fact[:1]), torch.full((1, HEADS, RANK), power), **CLOSE)


def test_rotated_keys_keep_their_angles_to_each_other():
    """To the other keys, they are random: (k · q)² is 1 / R in the mean over many draws."""
    writes = Writes(*(x.expand(DRAWS, -1, -1, -1) for x in some_writes(1).all))
    fact = (torch.arange(TOKENS) == 0).expand(DRAWS, -1)
    rotated = writes.with_rotated_keys(~fact, torch.Generator().manual_seed(3))
    products, before = (torch.einsum("bthi,bshi->bhts", one.k, one.k) for one in (rotated, writes))
    torch.testing.assert_close(products[:, :, 1:, 1:], before[:, :, 1:, 1:], **CLOSE)
    assert torch.equal(rotated.k[:, 0], writes.k[:, 0])
    overlap = products[:, :, 0, 1:].square()
    assert ((overlap.mean(0) - 1 / RANK).abs() < FIVE_SIGMA * overlap.std(0) / DRAWS**0.5).all()
    assert (products[:, :, 0, 1:].mean(0).abs() < FIVE_SIGMA * products[:, :, 0, 1:].std(0) / DRAWS**0.5).all()


def test_a_repeated_key_is_overwritten_and_orthogonal_ones_are_kept():
    """By the delta rule, R associations with orthogonal keys are kept, and β = 1 replaces one of them."""
    keys = torch.eye(RANK)[[*range(RANK), 1]].view(1, RANK + 1, 1, RANK)
    values = torch.randn(1, RANK + 1, 1, RANK, generator=torch.Generator().manual_seed(2))
    ones = torch.ones_like(values)
    state = Writes(keys, values, torch.zeros_like(values), ones, ones).state()
    for place, asked in ((0, 0), (RANK, 1), (2, 2)):
        torch.testing.assert_close(read(state, keys[:, asked]), values[:, place], **CLOSE)


def test_the_remaining_share_and_the_nearest_value():
    first = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    assert retained(torch.tensor([[1.5, 2.0], [0.0, 9.0]]), first).tolist() == [0.5, 0.0]
    prototypes = torch.stack([torch.eye(2), -torch.eye(2)])
    assert nearest(torch.tensor([[0.1, 0.3], [-2.0, 0.1]]), prototypes).tolist() == [1, 0]

"""`benchmarks/mqar.py` and `mqar_task.py`: every pair written is asked, and predictions follow from the update rule."""

from __future__ import annotations

import json
import math

import mqar
import mqar_task
import pytest
import torch
from click.testing import CliRunner

from deltamem_tool import DeltaMemConfig
from deltamem_tool.ops.gates import normalise
from deltamem_tool.ops.scan import read_state

RANK = 8
STEPS = 100  # after which a layer of the shipped shape recalls a single pair
LEARNED, CHANCE = 0.8, 0.05
CLOSE = {"atol": 1e-5, "rtol": 1e-4}


def drawn(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def config(rank: int = RANK, states: int = 1, **options: object) -> DeltaMemConfig:
    return DeltaMemConfig.from_dict(
        {"rank": rank, "state_heads": states, "heads": ["o"], "update_rule": "no_lambda", **options}
    )


def test_every_pair_is_written_once_and_asked_once():
    words = mqar_task.Words.draw(drawn())
    sequences = mqar_task.Sequences.draw(words, 5, 16, drawn(1))
    for written, asked, values in zip(sequences.written, sequences.asked, sequences.values, strict=True):
        assert torch.equal(written[:, : mqar_task.HALF], words.values[values])
        assert torch.equal(written[:, mqar_task.HALF :], asked[:, : mqar_task.HALF])
        assert not asked[:, mqar_task.HALF :].any()
        assert len(asked.unique(dim=0)) == 16  # no key twice: it would have two values


def test_orthogonal_keys_hold_exactly_rank_pairs():
    """The bound of the table: R keys are read without error, and at least one of R + 1 is not."""
    values = torch.randn(1, RANK + 1, 1, RANK, generator=drawn())
    keys = torch.eye(RANK)[[*range(RANK), 0]].view(1, RANK + 1, 1, RANK)
    none, ones = torch.zeros_like(values), torch.ones_like(values)
    fits = [x[:, :RANK] for x in (keys, values, none, ones, ones)]
    torch.testing.assert_close(mqar_task.written_and_read(*fits, fits[0]), values[:, :RANK], **CLOSE)
    assert not torch.allclose(mqar_task.written_and_read(keys, values, none, ones, ones, keys), values, **CLOSE)


def test_random_keys_forget_at_the_predicted_rate():
    """The mean share that is left of the first of n values in its own reading: a factor of (1 − β/R) per write."""
    beta, pairs, count = 0.5, 12, 4000
    values = torch.zeros(count, pairs, 1, RANK)
    values[:, 0] = 1.0
    keys = torch.nn.functional.normalize(torch.randn(values.shape, generator=drawn()), dim=-1)
    gate = torch.full_like(values, beta)
    left = mqar_task.written_and_read(keys, values, torch.zeros_like(gate), gate, gate, keys)[:, 0].mean() / beta
    assert left.item() == pytest.approx((1 - beta / RANK) ** (pairs - 1), abs=0.01)


def test_the_prediction_falls_with_pairs_and_grows_with_states():
    few, many = (max(mqar_task.predict(config(), 64, pairs, drawn()).values()) for pairs in (1, 32))
    more_states = max(mqar_task.predict(config(states=8), 64, 32, drawn()).values())
    assert few == 1.0 and many < 0.5 < more_states


def test_a_rule_that_decays_holds_as_much_only_with_gates_nearly_shut():
    kept, faded = (
        mqar_task.predict(config(states=4, update_rule=rule), 64, 16, drawn()) for rule in ("no_lambda", "standard")
    )
    assert faded[0.25] < kept[0.25] - 0.2
    assert max(faded, key=faded.__getitem__) < max(kept, key=kept.__getitem__)
    assert max(faded.values()) > max(kept.values()) - 0.1


def test_recall_matches_the_equation():
    """`recall` is compared with the equation."""
    words, layer = mqar_task.Words.draw(drawn()), mqar_task.new_layer(config(states=2, delta_init="random"))
    sequences = mqar_task.Sequences.draw(words, 3, 4, drawn(1))
    with torch.no_grad():
        actual = mqar_task.recall(layer, words, sequences)
        part = {name: getattr(layer, name)(sequences.written).view(3, 4, 2, RANK) for name in ("key", "value", "gate")}
        k, beta = normalise(part["key"]), torch.sigmoid(part["gate"])
        state = torch.zeros(3, 2, RANK, RANK)
        for n in range(4):
            change = beta[:, n] * (part["value"][:, n] - torch.einsum("bhij,bhj->bhi", state, k[:, n]))
            state = state + torch.einsum("bhi,bhj->bhij", change, k[:, n])
        q = normalise(layer.query(sequences.asked).view(3, 4, 2, RANK))
        readings = read_state(state, q).flatten(2) * layer.config.scale
        expected = readings @ layer.delta_of("o").weight.mT @ words.values.mT
    assert actual.abs().max() > 0
    torch.testing.assert_close(actual, expected, **CLOSE)


@pytest.mark.slow
def test_a_trained_layer_recalls_by_key():
    layer, words, curve = mqar_task.train(config(states=16, alpha=16.0), 0, STEPS, watch=True)
    recall, _ = mqar_task.asked(lambda s: mqar_task.recall(layer, words, s), words, 4, drawn(3))
    assert recall > LEARNED
    assert [step for step, _ in curve] == list(range(mqar_task.WATCH_EVERY, STEPS + 1, mqar_task.WATCH_EVERY))

    def of_other_keys(sequences: mqar_task.Sequences) -> torch.Tensor:
        others = mqar_task.Sequences.draw(words, len(sequences.values), 4, drawn(4))
        return mqar_task.recall(layer, words, mqar_task.Sequences(sequences.written, others.asked, sequences.values))

    confused, _ = mqar_task.asked(of_other_keys, words, 4, drawn(3))
    assert confused < 1 / 4 + CHANCE  # at best one of the four existing values


def test_keys_of_a_new_layer_overlap_like_random_ones():
    words = mqar_task.Words.draw(drawn())
    torch.manual_seed(0)
    assert mqar_task.overlap(mqar_task.new_layer(config(states=8)), words) == pytest.approx(1 / RANK, rel=0.1)


@pytest.mark.parametrize(
    ("recalls", "held"), [([0.8, 0.5], None), ([1.0, 0.95], math.inf), ([1.0, 0.8], 2**0.5), ([0.9, 0.5], 1)]
)
def test_the_number_of_pairs_held_is_counted(recalls, held):
    assert mqar.held([1, 2], recalls) == (held if held is None else pytest.approx(held))


@pytest.mark.slow
def test_an_interrupted_run_resumes(tmp_path, monkeypatch):
    """The whole grid takes minutes, so only its smallest shape and the shipped one are run."""
    for name, value in {"RULES": {"no_lambda": {}}, "RANKS": [4], "STATES": [1], "SEEDS": 1, "SHIPPED": (8, 2)}.items():
        monkeypatch.setattr(mqar, name, value)
    out = tmp_path / "results.md"
    arguments = ["--steps", "1", "--rule-steps", str(mqar_task.WATCH_EVERY), "--out", str(out)]
    assert not CliRunner().invoke(mqar.main, arguments, catch_exceptions=False).exception
    log = out.with_suffix(".jsonl")
    cells = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(cell["rank"], cell["states"], cell["steps"]) for cell in cells] == [(4, 1, 1), (8, 2, 1), (8, 2, 20)]
    assert (tmp_path / "capacity-mqar.png").stat().st_size > 0
    first = out.read_text()
    monkeypatch.setattr(mqar, "measure", None)  # nothing is measured twice
    assert not CliRunner().invoke(mqar.main, arguments, catch_exceptions=False).exception
    assert out.read_text() == first and len(log.read_text().splitlines()) == len(cells)

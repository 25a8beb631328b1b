"""Sampling keeps the tokens that transformers keeps, with the same probabilities."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from deltamem_tool.chat.sampling import (
    GreedySampler,
    Sampler,
    Sampling,
    apply_repetition_penalty,
    probabilities,
    token_mask,
)
from deltamem_tool.errors import ConfigError, DeltaMemError

VOCABULARY = 500
TOLERANCE = 1e-6
CONTEXT = np.array([3, 3, 77, 400])
CASES = [
    {"temperature": 0.7},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 10_000},
    {"top_p": 0.9},
    {"top_p": 0.3},
    {"top_p": 1e-9},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"repetition_penalty": 1.8},
    {"repetition_penalty": 0.5},
    {"temperature": 1.6, "top_k": 40, "top_p": 0.8, "min_p": 0.05, "repetition_penalty": 1.3},
    {"temperature": 0.3, "top_k": 100, "top_p": 0.95, "min_p": 0.02},
]


def logits(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3, VOCABULARY).astype(np.float32)


def of_the_package(scores: np.ndarray, sampling: Sampling) -> np.ndarray:
    is_in_context = np.zeros(VOCABULARY, bool)
    is_in_context[CONTEXT] = True
    return probabilities(apply_repetition_penalty(scores, is_in_context, sampling.repetition_penalty), sampling)


def in_transformers(scores: np.ndarray, sampling: Sampling) -> np.ndarray:
    """The probabilities by transformers' own processors, in the order of `generate`."""
    processors = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    processors.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        processors.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        processors.append(MinPLogitsWarper(sampling.min_p))
    scores = processors(torch.from_numpy(CONTEXT)[None], torch.from_numpy(scores)[None].double())
    return scores.softmax(-1)[0].numpy()


@pytest.mark.parametrize("options", CASES, ids=str)
@pytest.mark.parametrize("seed", range(5))
def test_kept_tokens_and_their_probabilities_match_transformers(options, seed):
    sampling = Sampling(**{"temperature": 1.0, **options})
    actual, expected = of_the_package(logits(seed), sampling), in_transformers(logits(seed), sampling)
    assert np.array_equal(actual > 0, expected > 0)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE)


def test_processors_run_in_the_order_of_generate():
    """A model's `generate` builds the same list of processors from the same options."""
    from helpers.tiny import tiny_model
    from transformers import GenerationConfig

    config = GenerationConfig(
        do_sample=True, temperature=0.5, top_k=4, top_p=0.5, min_p=0.1, repetition_penalty=1.1, eos_token_id=None
    )
    built = tiny_model()._get_logits_processor(config, input_ids_seq_length=1, device="cpu")
    assert [type(processor) for processor in built] == [
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
        MinPLogitsWarper,
    ]


def test_drawn_tokens_have_the_expected_probabilities():
    """In 20,000 draws, each token's share is within five standard deviations."""
    draws, scores = 20_000, logits(0)
    sampling = Sampling(temperature=1.5, top_k=6, seed=0)
    chances = of_the_package(scores, sampling)
    sampler = Sampler(sampling, CONTEXT, token_mask(range(VOCABULARY)))
    counts = np.bincount([sampler.pick(scores) for _ in range(draws)], minlength=VOCABULARY)
    assert (counts[chances == 0] == 0).all()
    deviation = np.sqrt(draws * chances * (1 - chances))
    assert (np.abs(counts - draws * chances) <= 5 * deviation).all()


def test_greedy_takes_the_likeliest_and_the_penalty_counts_generated_tokens():
    scores = np.full(VOCABULARY, -5.0, np.float32)
    scores[[10, 20]] = 4.0, 3.0
    greedy = Sampler(Sampling(), CONTEXT, token_mask(range(VOCABULARY)))
    assert [greedy.pick(scores) for _ in range(3)] == [10, 10, 10]
    with_penalty = Sampler(Sampling(repetition_penalty=2.0), CONTEXT, token_mask(range(VOCABULARY)))
    assert [with_penalty.pick(scores) for _ in range(3)] == [10, 20, 10]  # 4, then 3 against 2, then 2 against 1.5
    after = Sampler(Sampling(repetition_penalty=2.0), np.array([10]), token_mask(range(VOCABULARY)))
    assert after.pick(scores) == 20  # 10 is in the context


def test_only_valid_tokens_are_chosen():
    """There are fewer logits than token ids in the context, or more logits than tokens."""
    for length in (90, 600):
        sampler = Sampler(Sampling(repetition_penalty=2.0), CONTEXT, token_mask([3, 50, 400]))
        scores = np.zeros(length, np.float32)
        scores[[3, 4, 50]] = 9.0, 100.0, 5.0
        assert [sampler.pick(scores) for _ in range(2)] == [50, 3]


SETTINGS = [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 3, "top_p": 0.5, "min_p": 0.1}]


@pytest.mark.parametrize("options", SETTINGS, ids=str)
@pytest.mark.parametrize("damage", ["one NaN", "all NaN", "infinity", "no token is possible"])
def test_nan_logits_raise(options, damage):
    scores = logits(0)
    scores[{"one NaN": 7, "infinity": 7}.get(damage, slice(None))] = {
        "infinity": np.inf,
        "no token is possible": -np.inf,
    }.get(damage, np.nan)
    with pytest.raises(DeltaMemError, match="NaN or infinity"):
        Sampler(Sampling(**options), CONTEXT, token_mask(range(VOCABULARY))).pick(scores)


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_minus_infinity_logits_are_allowed(options):
    """Some models give minus infinity to tokens that they never generate. Logits without a token are ignored."""
    scores = np.full(VOCABULARY, -np.inf, np.float32)
    scores[[10, 20]] = 1.0, np.nan
    assert Sampler(Sampling(**options), CONTEXT, token_mask([5, 10, 30])).pick(scores) == 10


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1e-320},
        {"temperature": 1e-3, "repetition_penalty": 1e-300},
        {"temperature": 1.0, "repetition_penalty": 1e308},
        {"temperature": 1e308, "top_k": 5},
    ],
    ids=str,
)
def test_options_at_the_edge_of_their_range_choose_a_token(options):
    assert (
        0 <= Sampler(Sampling(**options, seed=0), CONTEXT, token_mask(range(VOCABULARY))).pick(logits(0)) < VOCABULARY
    )


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 0},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": float("inf")},
        {"seed": -1},
        {"stop": ("",)},
        {"stop": "text"},
        {"stop": ("half \ud83d",)},
    ],
    ids=str,
)
def test_an_option_out_of_range_raises(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        Sampling(**options)


def test_a_batch_of_greedy_samplers_matches_each_alone():
    """Holds for any logits of valid and of invalid tokens."""
    random = np.random.default_rng(0)
    ids = {7, 11, 300, *random.choice(400, 40).tolist()}
    rows = random.normal(size=(400, VOCABULARY)).astype(np.float32)
    for row in rows[:300]:
        odd = random.choice([np.nan, np.inf, -np.inf], size=3)
        row[random.choice(VOCABULARY, size=3)] = odd
    rows[300:310] = -np.inf
    expected = []
    for row in rows:
        try:
            expected.append(Sampler(Sampling(), CONTEXT, token_mask(ids)).pick(row))
        except DeltaMemError:
            expected.append(None)
    assert GreedySampler(token_mask(ids)).pick(rows) == expected
    assert 10 < expected.count(None) < 200 and set(expected) <= {*ids, None}

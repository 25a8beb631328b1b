"""Every option of the mechanism, alone and combined, compared with the equations, and the effects of single options."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from helpers.model_runs import CUT_TOLERANCE, EQUATION_TOLERANCE, cache_of, close, every_architecture
from helpers.naive_model import naive_run
from helpers.tiny import ARCHITECTURES, patched_model, randomise, tiny_model, tokens

from deltamem_tool import DeltaMemConfig, MemoryCache, MemoryState, attach
from deltamem_tool._compat import cache_argument
from deltamem_tool.config import BRANCHES, DELTA_INITS, DELTA_SCALES, GATES, GRANULARITIES, UPDATE_RULES
from deltamem_tool.memory.attach import adapter_of

TAGS = [0, 1, 1, 2, 1, 2, 0, 2, 1, 1, 2, 1]  # segments of 3, 2, 1 and 3 tokens, and one that remains open
LENGTH = len(TAGS)
COMBINATIONS = range(30)

ALONE = [
    {"granularity": "message"},
    {"granularity": "sentence", "state_heads": 2},
    {"couple_lambda": False},
    {"couple_lambda": False, "update_rule": "lambda_outside"},
    {"gates": "head"},
    {"gates": "head", "state_heads": 3},
    {"gates": "head", "couple_lambda": False, "state_heads": 2},
    {"delta_scale": "layer"},
    {"delta_scale": "branch", "branches": BRANCHES, "delta_scale_max": 3.0},
    {"o_norm": True, "o_norm_eps": 1e-3},
    {"layers": "front:1"},
    {"layers": "back:1"},
    {"rank": 1},
    {"rank": 16},
    *({"state_heads": count, "rank": 3} for count in (2, 3, 4)),
]


def random_options(seed: int) -> dict:
    """A random choice of options that are compatible."""
    choose = random.Random(seed)
    heads = tuple(branch for branch in BRANCHES if choose.random() < 0.6) or ("o",)
    rule = choose.choice(UPDATE_RULES)
    return {
        "rank": choose.choice((2, 3, 4, 8)),
        "state_heads": choose.choice((1, 2, 3, 4)),
        "branches": heads,
        "alpha": choose.choice((1.0, 6.0, 16.0)),
        "layers": choose.choice(("all", "front:1", "middle:2", "back:1", (1,))),
        "granularity": choose.choice(GRANULARITIES),
        "update_rule": rule,
        "couple_lambda": rule == "no_lambda" or choose.random() < 0.5,
        "gates": choose.choice(GATES),
        "beta_bias": choose.choice((-3.0, -1.5, 0.5)),
        "delta_init": choose.choice(DELTA_INITS),
        "delta_scale": choose.choice(DELTA_SCALES),
        "delta_scale_init": choose.choice((0.1, 1.0)),
        "delta_scale_max": choose.choice((1.5, 2.0)),
        "o_norm": "o" in heads and choose.random() < 0.5,
        "o_norm_eps": choose.choice((1e-6, 1e-3)),
    }


def tagged(model, tags=TAGS, memory=None, batch=1):
    """A cache that knows the tags of the next tokens, if its adapter uses them."""
    cache = MemoryCache(model, memory=memory)
    if adapter_of(model).config.granularity != "token":
        cache.segment_tags = torch.tensor([tags] * batch, dtype=torch.int8)
    return cache


def tags_of(model):
    return None if adapter_of(model).config.granularity == "token" else TAGS


@torch.no_grad()
def run(model, ids, memory=None):
    cache = tagged(model, memory=memory, batch=len(ids))
    return model(ids, cache=cache).logits, cache


def assert_matches_the_equations(model, memory=None):
    """Compare logits and states, also after the open segment has ended."""
    ids = tokens(1, LENGTH)
    logits, cache = run(model, ids, memory)
    states = {layer: state[0] for layer, state in memory.layers.items()} if memory else None
    for end in (False, True):
        expected, after = naive_run(model, ids[0].tolist(), states, tags=tags_of(model), end=end)
        close(logits[0], expected, EQUATION_TOLERANCE)
        assert sorted(cache.memory.layers) == sorted(after) == adapter_of(model).layer_indices
        for layer, state in after.items():
            close(cache.memory.layers[layer][0], state, EQUATION_TOLERANCE)
        if tags_of(model) and not end:
            cache.end_segment()


@every_architecture
@pytest.mark.parametrize("options", ALONE, ids=str)
def test_each_option_matches_the_equations(name, options):
    assert_matches_the_equations(patched_model(name, **options))


@pytest.mark.parametrize("seed", COMBINATIONS)
def test_combined_options_match_the_equations(seed):
    model = patched_model(ARCHITECTURES[seed % 3], seed, **random_options(seed))
    start = adapter_of(model).empty_memory(1)
    generator = torch.Generator().manual_seed(seed)
    states = {layer: torch.randn(state.shape, generator=generator) for layer, state in start.layers.items()}
    assert_matches_the_equations(model, MemoryState(states, start.adapter, start.open_segments))


def test_the_combinations_cover_every_value():
    """Otherwise, the comparison above would not cover all values."""
    drawn = [random_options(seed) for seed in COMBINATIONS]
    for option, values in {
        "granularity": GRANULARITIES,
        "update_rule": UPDATE_RULES,
        "gates": GATES,
        "delta_scale": DELTA_SCALES,
        "delta_init": DELTA_INITS,
        "state_heads": (1, 2, 3, 4),
        "couple_lambda": (True, False),
        "o_norm": (True, False),
    }.items():
        assert {options[option] for options in drawn} == set(values), option
        for name in range(3):
            assert len({options[option] for options in drawn[name::3]}) > 1, (option, ARCHITECTURES[name])


@pytest.mark.parametrize(
    ("options", "taken_for"),
    [
        ({"couple_lambda": False}, {"couple_lambda": True}),
        ({"couple_lambda": False, "update_rule": "lambda_outside"}, {"update_rule": "standard"}),
        ({"gates": "row", "state_heads": 3}, {"gates": "head"}),
        ({"delta_scale": "layer"}, {"delta_scale": "fixed"}),
        ({"delta_scale": "branch"}, {"delta_scale": "layer"}),
        ({"delta_scale": "layer", "delta_scale_max": 2.0}, {"delta_scale_max": 2.01}),
        ({"o_norm": True}, {"o_norm": False}),
        ({"o_norm": True, "o_norm_eps": 1e-2}, {"o_norm_eps": 1e-3}),
        ({"alpha": 16.0}, {"alpha": 16.1}),
    ],
    ids=str,
)
def test_options_give_different_results(options, taken_for):
    model = patched_model(**options)
    ids = tokens(1, LENGTH)
    logits, _ = run(model, ids)
    adapter = adapter_of(model)
    adapter.config = replace(adapter.config, **taken_for)  # read by the equations, and not by the model
    expected, _ = naive_run(model, ids[0].tolist())
    assert (logits[0] - expected).abs().max() > 20 * EQUATION_TOLERANCE


def test_segments_give_different_results():
    model, ids = patched_model(granularity="message"), tokens(1, LENGTH)
    logits, cache = run(model, ids)
    for tags in ([2] * LENGTH, [0, 1, 1, 1, 1, 2, 0, 2, 1, 1, 2, 1], [1, 1, 1, 2, 1, 2, 0, 2, 1, 1, 2, 1]):
        expected, states = naive_run(model, ids[0].tolist(), tags=tags)
        assert (logits[0] - expected).abs().max() > 20 * EQUATION_TOLERANCE
        assert (cache.memory.layers[1][0] - states[1]).abs().max() > 20 * EQUATION_TOLERANCE


@pytest.mark.parametrize("state_heads", [1, 4])
@pytest.mark.parametrize("granularity", ["token", "message"])
def test_the_largest_rank_matches_the_equations(state_heads, granularity):
    model = tiny_model(hidden_size=64)
    options = DeltaMemConfig(rank=64, state_heads=state_heads, granularity=granularity, layers=(0,))
    randomise(attach(model, options))
    assert_matches_the_equations(model)


@pytest.mark.parametrize("seed", COMBINATIONS)
@torch.no_grad()
def test_a_fresh_memory_leaves_logits_bit_identical(seed):
    model, ids = tiny_model(ARCHITECTURES[seed % 3], seed), tokens(2, LENGTH)
    whole, first = model(ids).logits, model(ids[:, :5], use_cache=True)
    rest = model(ids[:, 5:], **{cache_argument(model.forward): cache_of(first)}).logits
    attach(model, DeltaMemConfig(**{**random_options(seed), "delta_init": "zero"}))
    logits, cache = run(model, ids)
    assert torch.equal(logits, whole)
    assert any(state.any() for state in cache.memory.layers.values()), "nothing was written"
    cache = tagged(model, batch=2)
    assert torch.equal(model(ids[:, :5], cache=cache).logits, first.logits)
    assert torch.equal(model(ids[:, 5:], cache=cache).logits, rest)


@pytest.mark.parametrize("seed", COMBINATIONS)
def test_every_parameter_gets_a_gradient(seed):
    """Except the raw scales of disabled branches."""
    options = {**random_options(seed), "o_norm_eps": 1e-3}
    model = patched_model(ARCHITECTURES[seed % 3], seed, **options)
    logits = model(tokens(1, LENGTH), cache=tagged(model)).logits
    torch.manual_seed(0)
    (logits * torch.randn_like(logits)).sum().backward()
    for name, parameter in adapter_of(model).named_parameters():
        gradient = parameter.grad
        assert gradient is not None and gradient.isfinite().all(), name
        if name.endswith("scale_raw") and options["delta_scale"] == "branch":
            assert [bool(part) for part in gradient] == [branch in options["branches"] for branch in BRANCHES], name
        else:
            assert gradient.any(), name


# Effects of single options on the results.


@pytest.mark.parametrize("state_heads", [1, 3])
def test_a_gate_per_head_equals_equal_gates_per_row(state_heads):
    options = {"state_heads": state_heads, "couple_lambda": False}
    one, rows = patched_model(gates="head", **options), patched_model(gates="row", **options)
    weights = adapter_of(one).state_dict()
    for name, weight in weights.items():
        if ".gate." in name or ".decay." in name:
            assert weight.shape[0] == state_heads
            weights[name] = weight.repeat_interleave(4, dim=0)
    adapter_of(rows).load_state_dict(weights)
    ids = tokens(2, LENGTH)
    (logits, cache), (expected, other) = run(one, ids), run(rows, ids)
    close(logits, expected, CUT_TOLERANCE)
    for layer, state in other.memory.layers.items():
        close(cache.memory.layers[layer], state, CUT_TOLERANCE)


@pytest.mark.parametrize("rule", ["standard", "lambda_outside"])
@pytest.mark.parametrize("gates", GATES)
def test_a_separate_decay_starts_as_one_minus_beta(rule, gates):
    options = {"update_rule": rule, "gates": gates, "beta_bias": -2.0, "delta_init": "random", "rank": 4}
    coupled, own = tiny_model(), tiny_model()
    weights = attach(coupled, DeltaMemConfig(**options)).state_dict()
    adapter = attach(own, DeltaMemConfig(couple_lambda=False, **options))
    missing, unexpected = adapter.load_state_dict(weights, strict=False)
    assert not unexpected and {name.split(".")[2] for name in missing} == {"decay"}
    ids = tokens(1, LENGTH)
    (logits, cache), (expected, other) = run(own, ids), run(coupled, ids)
    close(logits, expected, CUT_TOLERANCE)
    for layer, state in other.memory.layers.items():
        close(cache.memory.layers[layer], state, CUT_TOLERANCE)


def test_state_heads_are_independent():
    """Two heads are two separate memories: writing to one does not change the other."""
    model, ids = patched_model(state_heads=2, layers=(0,)), tokens(1, LENGTH)
    _, cache = run(model, ids)
    with torch.no_grad():
        memory = adapter_of(model).layers["0"]
        for projection in (memory.key, memory.value, memory.gate):
            projection.weight[4:].mul_(2)
    _, other = run(model, ids)
    assert torch.equal(cache.memory.layers[0][:, 0], other.memory.layers[0][:, 0])
    assert (cache.memory.layers[0][:, 1] - other.memory.layers[0][:, 1]).abs().max() > 1e-2


@torch.no_grad()
def corrections(memory, seed=0):
    torch.manual_seed(seed)
    readings = torch.randn(2, 5, memory.config.state_heads * memory.config.rank)
    return {branch: memory.correction(branch, memory.scale_readings(readings)) for branch in memory.config.branches}


@pytest.mark.parametrize(("delta_scale", "count"), [("layer", 1), ("branch", 4)])
def test_learned_scales_start_at_their_initial_value_and_are_bounded(delta_scale, count):
    options = {"rank": 4, "branches": ("q", "v", "o"), "delta_init": "random"}
    torch.manual_seed(0)
    fixed = attach(tiny_model(), DeltaMemConfig(**options)).layer(1)
    learned = DeltaMemConfig(delta_scale=delta_scale, delta_scale_init=0.3, delta_scale_max=1.7, **options)
    scaled = attach(tiny_model(), learned).layer(1)
    scaled.load_state_dict(fixed.state_dict(), strict=False)
    raw = scaled.scale_raw.data
    assert raw.shape == (count,)

    def scales():
        actual, plain = corrections(scaled), corrections(fixed)
        return {branch: float((actual[branch] / plain[branch]).mean()) for branch in plain}

    assert scales() == pytest.approx(dict.fromkeys("qvo", 0.3), abs=1e-6)
    for value, bound in ((100.0, 1.7), (-100.0, 0.0)):
        raw.fill_(value)
        assert scales() == pytest.approx(dict.fromkeys("qvo", bound), abs=1e-6)
    raw.zero_()  # half of the maximum
    raw[-1] = 100.0  # o's own, or the common one
    others = 1.7 if delta_scale == "layer" else 0.85
    assert scales() == pytest.approx({"q": others, "v": others, "o": 1.7}, abs=1e-6)


def test_o_norm_affects_only_the_o_branch():
    options = {"rank": 4, "branches": BRANCHES, "delta_init": "random"}
    plain, normed = (attach(tiny_model(), DeltaMemConfig(o_norm=on, **options)).layer(0) for on in (False, True))
    normed.load_state_dict(plain.state_dict(), strict=False)
    with torch.no_grad():
        for memory in (plain, normed):
            memory.delta["o"].weight.mul_(100)  # so that o_norm_eps is small in comparison
        normed.o_norm.weight.fill_(0.7)
    before, after = corrections(plain), corrections(normed)
    assert all(torch.equal(after[branch], before[branch]) for branch in "qkv")
    close(after["o"].square().mean(-1).sqrt(), torch.full((2, 5), 0.7), 1e-4)
    close(torch.cosine_similarity(after["o"], before["o"], dim=-1), torch.ones(2, 5), 1e-5)
    with torch.no_grad():
        normed.o_norm.weight[3] = 1.4
    again = corrections(normed)["o"]
    assert torch.equal(again[..., 3], after["o"][..., 3] * 2)
    again[..., 3] = after["o"][..., 3]
    assert torch.equal(again, after["o"])

"""Parameters, states, initial values and layers that each option creates, and invalid options."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.tiny import tiny_model, tokens
from transformers import AutoModelForCausalLM

from deltamem_tool import DeltaMemConfig, MemoryCache, attach
from deltamem_tool.config import BRANCHES, MAX_RANK
from deltamem_tool.errors import ArchitectureError, ConfigError

# The hidden size of the tiny Qwen3, and the widths of its q, k, v and o.
HIDDEN, WIDTHS = 32, {"q": 64, "k": 32, "v": 32, "o": 32}
# Maximum deviation of the standard deviation of some hundred random numbers.
SPREAD_TOLERANCE = 0.15
ROUNDING = 1e-7  # float32, for numbers of order 0.05

# The parameters of one layer at rank 4, by the name of their shape.
USUAL = {
    "query.weight": [4, HIDDEN],
    "key.weight": [4, HIDDEN],
    "value.weight": [4, HIDDEN],
    "gate.weight": [4, HIDDEN],
    "gate.bias": [4],
    "delta.q.weight": [64, 4],
    "delta.o.weight": [32, 4],
}


@pytest.mark.parametrize(
    ("options", "changed", "state", "segment"),
    [
        ({}, {}, (1, 4, 4), 0),
        ({"granularity": "message"}, {}, (1, 4, 4), 4 + 4 + 4 + 1),
        ({"granularity": "sentence"}, {}, (1, 4, 4), 4 + 4 + 4 + 1),
        ({"update_rule": "lambda_outside"}, {}, (1, 4, 4), 0),
        ({"update_rule": "no_lambda"}, {}, (1, 4, 4), 0),
        ({"alpha": 3.0, "beta_bias": 1.0}, {}, (1, 4, 4), 0),
        ({"delta_init": "random"}, {}, (1, 4, 4), 0),
        ({"delta_init": "base_slice"}, {}, (1, 4, 4), 0),
        ({"couple_lambda": False}, {"decay.weight": [4, HIDDEN], "decay.bias": [4]}, (1, 4, 4), 0),
        ({"gates": "head"}, {"gate.weight": [1, HIDDEN], "gate.bias": [1]}, (1, 4, 4), 0),
        ({"delta_scale": "layer"}, {"scale_raw": [1]}, (1, 4, 4), 0),
        ({"delta_scale": "branch"}, {"scale_raw": [4]}, (1, 4, 4), 0),
        ({"o_norm": True}, {"o_norm.weight": [32]}, (1, 4, 4), 0),
        ({"branches": ["k", "o"]}, {"delta.q.weight": None, "delta.k.weight": [32, 4]}, (1, 4, 4), 0),
        ({"branches": BRANCHES}, {"delta.k.weight": [32, 4], "delta.v.weight": [32, 4]}, (1, 4, 4), 0),
        (
            {"granularity": "message", "couple_lambda": False},
            {"decay.weight": [4, HIDDEN], "decay.bias": [4]},
            (1, 4, 4),
            4 + 4 + 2 * 4 + 1,
        ),
        (
            {"granularity": "message", "couple_lambda": False, "gates": "head"},
            {
                "gate.weight": [1, HIDDEN],
                "gate.bias": [1],
                "decay.weight": [1, HIDDEN],
                "decay.bias": [1],
            },
            (1, 4, 4),
            4 + 4 + 2 * 1 + 1,
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("state_heads", [1, 3])
def test_an_option_adds_only_its_parameters(options, changed, state, segment, state_heads):
    expected = {name: shape for name, shape in {**USUAL, **changed}.items() if shape is not None}
    rows = ("query", "key", "value", "gate", "decay")
    for name, shape in expected.items():  # more heads mean more rows, and more columns of Δ
        if name.split(".")[0] in rows:
            expected[name] = [shape[0] * state_heads, *shape[1:]]
        elif name.startswith("delta."):
            expected[name] = [shape[0], shape[1] * state_heads]
    model = tiny_model()
    adapter = attach(model, DeltaMemConfig(rank=4, state_heads=state_heads, **options))
    shapes = {name: list(weight.shape) for name, weight in adapter.named_parameters()}
    assert shapes == {f"layers.{layer}.{name}": shape for layer in (0, 1) for name, shape in expected.items()}
    assert all(weight.dtype == torch.float32 and weight.requires_grad for weight in adapter.parameters())
    cache = MemoryCache(model)
    with torch.no_grad():
        model(tokens(2, 5), cache=cache)
    assert {layer: value.shape for layer, value in cache.memory.layers.items()} == {
        layer: (2, state_heads, *state[1:]) for layer in (0, 1)
    }
    if segment:
        segment = (segment - 1) * state_heads + 1
        assert {layer: value.shape for layer, value in cache.memory.open_segments.items()} == {
            0: (2, segment),
            1: (2, segment),
        }
        assert cache.memory.open_tokens.tolist() == [5, 5]
    else:
        assert cache.memory.open_segments == {} and cache.memory.open_tokens.tolist() == [0, 0]
    assert adapter.config.segment_width == segment


# Initial values.


def test_gates_start_at_their_bias():
    for options in ({}, {"gates": "head"}, {"state_heads": 2}):
        memory = attach(tiny_model(), DeltaMemConfig(couple_lambda=False, **options)).layer(0)
        assert not memory.gate.weight.any() and not memory.decay.weight.any()
        assert (memory.gate.bias == -1.5).all() and (memory.decay.bias == 1.5).all()
    memory = attach(tiny_model(), DeltaMemConfig(couple_lambda=False, beta_bias=0.25)).layer(1)
    assert (memory.gate.bias == 0.25).all() and (memory.decay.bias == -0.25).all()


def test_projections_are_initialised_uniformly():
    memory = attach(tiny_model(), DeltaMemConfig(rank=8, state_heads=4)).layer(0)
    for projection in (memory.query, memory.key, memory.value):
        most = 1 / math.sqrt(HIDDEN)
        assert projection.weight.abs().max() <= most
        assert projection.weight.std().item() == pytest.approx(most / math.sqrt(3), rel=SPREAD_TOLERANCE)


def test_delta_init_zero():
    for delta in attach(tiny_model(), DeltaMemConfig(branches=BRANCHES)).layer(1).delta.values():
        assert not delta.weight.any()


@pytest.mark.parametrize("state_heads", [1, 4])
def test_delta_init_random(state_heads):
    options = DeltaMemConfig(rank=8, state_heads=state_heads, branches=BRANCHES, delta_init="random")
    memories = []
    for seed in (0, 0, 1):
        model = tiny_model()
        torch.manual_seed(seed)
        memories.append(attach(model, options).layer(1))
    most = 0.05 / math.sqrt(8 * state_heads)
    for branch, width in WIDTHS.items():
        first, again, other = (memory.delta_of(branch).weight for memory in memories)
        assert first.shape[0] == width and first.abs().max() <= most
        assert first.std().item() == pytest.approx(most / math.sqrt(3), rel=SPREAD_TOLERANCE)
        assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize(
    ("rank", "state_heads", "filled"), [(1, 1, 1), (4, 1, 4), (8, 1, 8), (12, 1, 8), (4, 4, 4), (16, 2, 8)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_delta_init_base_slice(rank, state_heads, filled, dtype):
    model = tiny_model().to(dtype)
    options = DeltaMemConfig(rank=rank, state_heads=state_heads, branches=BRANCHES, delta_init="base_slice")
    adapter = attach(model, options)
    for layer in (0, 1):
        for branch in BRANCHES:
            base = getattr(model.model.layers[layer].self_attn, f"{branch}_proj").weight.double()
            delta = adapter.layer(layer).delta_of(branch).weight
            assert delta.dtype == torch.float32 and delta.shape == (WIDTHS[branch], rank * state_heads)
            for column in range(filled):
                expected = 0.05 * base[:, column] / base[:, column].square().sum().sqrt()
                torch.testing.assert_close(delta[:, column].double(), expected, atol=ROUNDING, rtol=0)
            assert not delta[:, filled:].any()


@pytest.mark.parametrize("share", [0.25, 0.5, 0.999])
def test_a_learned_scale_starts_at_its_initial_value(share):
    for kind, count in (("layer", 1), ("branch", 4)):
        options = DeltaMemConfig(delta_scale=kind, delta_scale_init=3 * share, delta_scale_max=3.0)
        raw = attach(tiny_model(), options).layer(0).scale_raw
        assert (torch.sigmoid(raw) * 3).tolist() == pytest.approx([3 * share] * count, rel=1e-5)


def test_the_norm_is_initialised_with_ones():
    assert (attach(tiny_model(), DeltaMemConfig(o_norm=True)).layer(0).o_norm.weight == 1).all()


# Layers.


@pytest.mark.parametrize(
    ("layers", "count", "expected"),
    [
        ("all", 5, [0, 1, 2, 3, 4]),
        ("front:1", 5, [0]),
        ("front:3", 5, [0, 1, 2]),
        ("back:1", 5, [4]),
        ("back:3", 5, [2, 3, 4]),
        ("middle:1", 5, [2]),
        ("middle:3", 5, [1, 2, 3]),
        ("middle:2", 5, [1, 2]),  # an odd remainder: one more after than before
        ("middle:4", 5, [0, 1, 2, 3]),
        ("middle:1", 4, [1]),
        ("middle:3", 6, [1, 2, 3]),
        ("middle:2", 6, [2, 3]),
        *((f"{part}:5", 5, [0, 1, 2, 3, 4]) for part in ("front", "middle", "back")),
        ((3, 1), 5, [1, 3]),
        ([4], 5, [4]),
    ],
)
def test_layers_can_be_selected_by_name(layers, count, expected):
    adapter = attach(tiny_model(num_hidden_layers=count), DeltaMemConfig(rank=2, layers=layers))
    assert adapter.layer_indices == expected


def test_the_layer_groups_of_the_paper_cover_all_layers():
    """Each group has twelve of the 36 layers of Qwen3-4B, and together they have all."""
    with torch.device("meta"):
        config = tiny_model().config
        config.num_hidden_layers, config.layer_types = 36, ["full_attention"] * 36
        layers = [
            attach(AutoModelForCausalLM.from_config(config), DeltaMemConfig(layers=f"{part}:12")).layer_indices
            for part in ("front", "middle", "back")
        ]
    assert layers == [list(range(12)), list(range(12, 24)), list(range(24, 36))]


@pytest.mark.parametrize("part", ["front", "middle", "back"])
def test_selecting_more_layers_than_exist_raises(part):
    with pytest.raises(ArchitectureError, match=rf"(?s)no 3 attention layers.*It has 2, and `layers` is '{part}:3'"):
        attach(tiny_model(), DeltaMemConfig(layers=f"{part}:3"))


# Presets.


@pytest.mark.parametrize(
    ("preset", "granularity", "state_heads"), [("tsw", "token", 1), ("ssw", "message", 1), ("msw", "token", 4)]
)
def test_presets_match_the_paper(preset, granularity, state_heads):
    assert DeltaMemConfig.preset(preset).to_dict() == {
        "rank": 8,
        "state_heads": state_heads,
        "heads": ["q", "o"],
        "alpha": 16.0,
        "layers": "all",
        "granularity": granularity,
        "update_rule": "standard",
        "couple_lambda": True,
        "gates": "row",
        "beta_bias": -1.5,
        "delta_init": "base_slice",
        "delta_scale": "fixed",
        "delta_scale_init": 1.0,
        "delta_scale_max": 2.0,
        "o_norm": False,
        "o_norm_eps": 1e-6,
    }
    assert DeltaMemConfig.preset(preset).scale == 2.0


def test_a_preset_can_be_changed():
    changed = DeltaMemConfig.preset("msw", rank=4, state_heads=2, branches=["o"])
    assert (changed.rank, changed.state_heads, changed.branches) == (4, 2, ("o",))
    assert changed.delta_init == "base_slice"
    assert DeltaMemConfig.from_dict(changed.to_dict()) == changed
    with pytest.raises(ConfigError, match=r"(?s)no preset 'xsw'.*tsw, ssw, msw"):
        DeltaMemConfig.preset("xsw")
    with pytest.raises(ConfigError, match="granuarity is not known: did you mean granularity"):
        DeltaMemConfig.preset("tsw", granuarity="message")


# Invalid options.


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("rank", [0, -1, MAX_RANK + 1, 2.0, "8", True, None]),
        ("state_heads", [0, -2, 1.0, True, None]),
        ("branches", [(), "qo", ("q", "x"), ("q", "q"), (1,), None]),
        ("alpha", [0.0, -1.0, math.inf, math.nan, "16", True, None]),
        ("layers", [(), "some", "front", "front:0", "front:-1", "front:1.5", "front:03", "back:2 ", (0, 0), (-1,)]),
        ("layers", [(True,), (1.0,), 3, None]),
        ("granularity", ["word", "message_mean", None, 1]),
        ("update_rule", ["delta", None]),
        ("couple_lambda", [0, 1, "false", None]),
        ("gates", ["rows", None]),
        ("beta_bias", [math.inf, math.nan, "0", None, True]),
        ("delta_init", ["zeros", None]),
        ("delta_scale", ["head", 1.0, None]),
        ("delta_scale_init", [0.0, -1.0, 2.0, 3.0, math.nan, None]),
        ("delta_scale_max", [0.0, 1.0, 0.5, math.inf, None]),
        ("o_norm", [0, 1, "true", None]),
        ("o_norm_eps", [0.0, -1e-6, math.nan, None]),
    ],
)
def test_an_invalid_value_is_named(option, values):
    for value in values:
        with pytest.raises(ConfigError, match=rf"(?s)options are invalid.*\b{option}\b"):
            DeltaMemConfig(**{option: value})


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"couple_lambda": False, "update_rule": "no_lambda"},
            "update_rule no_lambda has no λ: couple_lambda must be true",
        ),
        ({"o_norm": True, "branches": ("q", "v")}, "o_norm normalises the correction of o, which is not in branches"),
        ({"delta_scale_init": 0.5, "delta_scale_max": 0.5}, "delta_scale_init must be less than delta_scale_max"),
    ],
)
def test_invalid_combinations_of_options_raise(options, says):
    with pytest.raises(ConfigError, match=says):
        DeltaMemConfig(**options)


def test_an_unknown_option_is_named():
    with pytest.raises(ConfigError, match=r"state_head is not known: did you mean state_heads\?"):
        DeltaMemConfig.from_dict({"state_head": 4})


def test_files_store_branches_under_the_key_heads():
    config = DeltaMemConfig(branches=("k", "o"))
    assert config.to_dict()["heads"] == ["k", "o"] and "branches" not in config.to_dict()
    assert DeltaMemConfig.from_dict(config.to_dict()) == DeltaMemConfig.from_dict({"branches": ["k", "o"]}) == config
    with pytest.raises(ConfigError, match="heads is the old name of branches"):
        DeltaMemConfig.from_dict({"heads": ["k"], "branches": ["k"]})


def test_branches_can_be_given_under_the_older_name():
    with pytest.warns(FutureWarning, match="heads is now called branches"):
        assert DeltaMemConfig(heads=("k", "o")) == DeltaMemConfig(branches=("k", "o"))
    with pytest.warns(FutureWarning), pytest.raises(ConfigError, match="heads is the old name of branches"):
        DeltaMemConfig(heads=("k",), branches=("k",))

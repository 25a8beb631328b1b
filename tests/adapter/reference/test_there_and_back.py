"""Adapters of the reference implementation: conversion to our format and back is bit-identical."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from adapter.reference.adapters import (
    BASE,
    CASE,
    QUERY,
    assert_same_adapter,
    assert_same_tensors,
    change_config,
    change_tensors,
    read_tensors,
    writable,
)
from helpers.parity_cases import CASES, FOLDER
from helpers.tiny import randomise, tokens, weights_of
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from deltamem_tool import DeltaMemConfig, attach, convert, load, save_adapter
from deltamem_tool.adapter.config_file import CONFIG_FILE, WEIGHTS_FILE
from deltamem_tool.adapter.create import create_adapter
from deltamem_tool.adapter.folder import read_adapter
from deltamem_tool.adapter.reference.config import DEFAULTS, REFERENCE_CONFIG, config_of, mechanism_of
from deltamem_tool.adapter.reference.convert import NAMES
from deltamem_tool.config import PRESETS
from deltamem_tool.errors import AdapterError

TYPES = [*((case, dtype) for case in CASES for dtype in (torch.float32, torch.bfloat16)), (CASES[0], torch.float16)]


@pytest.mark.parametrize(("case", "dtype"), TYPES, ids=str)
def test_every_reference_adapter_round_trips(case, dtype, tmp_path):
    source = writable(FOLDER / case / "adapter", tmp_path / "source")
    change_tensors(source, lambda tensors: {name: tensor.to(dtype) for name, tensor in tensors.items()})
    result = convert(source, tmp_path / "ours", base=str(FOLDER / case / "base"))
    assert result.dtypes == (str(dtype).removeprefix("torch."),) and result.format == "deltamem"
    ours = read_adapter(tmp_path / "ours")
    assert result.parameters == ours.num_parameters()
    theirs = read_tensors(source)
    for name, tensor in weights_of(ours).items():
        _, layer, own = name.split(".", 2)
        original = next(key for key, value in NAMES.items() if value == own)
        assert torch.equal(tensor, theirs[f"model.layers.{layer}.self_attn.{original}"].float())
    back = convert(tmp_path / "ours", tmp_path / "back", to="reference")
    assert_same_adapter(tmp_path / "back", source)
    assert back.dtypes == result.dtypes and back.base == result.base
    assert back.parameters == sum(tensor.numel() for tensor in theirs.values())


def test_weights_of_several_dtypes_round_trip(reference, tmp_path):
    def mixed(tensors):
        return {name: tensor.bfloat16() if "proj" in name else tensor for name, tensor in tensors.items()}

    change_tensors(reference, mixed)
    result = convert(reference, tmp_path / "ours", base=BASE)
    assert result.dtypes == ("bfloat16", "float32")
    convert(tmp_path / "ours", tmp_path / "back", to="reference")
    assert_same_adapter(tmp_path / "back", reference)


def test_weights_in_any_order_and_shape_of_storage_are_read(reference, tmp_path):
    convert(reference, tmp_path / "a", base=BASE)
    change_tensors(reference, lambda tensors: {name: tensors[name].t().clone().t() for name in reversed(tensors)})
    convert(reference, tmp_path / "b", base=BASE)
    assert (tmp_path / "a" / WEIGHTS_FILE).read_bytes() == (tmp_path / "b" / WEIGHTS_FILE).read_bytes()


def test_fields_that_we_do_not_use_round_trip(reference, tmp_path):
    """Covers how a fresh Δ starts, the order of fields, and a shorter config of an older version."""
    config = change_config(
        reference, online_gain=0.1, base_slice_ref_width=4, output_init="base_slice", alpha=16, latent_gate_init=...
    )
    (reference / REFERENCE_CONFIG).write_text(json.dumps(dict(reversed(config.items())), indent=2))
    convert(reference, tmp_path / "ours", base=BASE)
    convert(tmp_path / "ours", tmp_path / "back", to="reference")
    assert_same_adapter(tmp_path / "back", reference)


def test_an_older_config_has_the_references_defaults(tmp_path):
    least = {"rank": 4, "delta_heads": ["o"]}
    assert mechanism_of(least, tmp_path) == DeltaMemConfig(rank=4, branches=("o",))
    assert mechanism_of(DEFAULTS, tmp_path) == DeltaMemConfig(branches=("q", "k", "v", "o"))
    published = json.loads((CASE / "adapter" / REFERENCE_CONFIG).read_text())
    assert list(published) == list(DEFAULTS)
    for name in ("rank", "delta_heads"):
        with pytest.raises(AdapterError, match=f"{name} is missing"):
            mechanism_of({key: value for key, value in least.items() if key != name}, tmp_path)


OURS = [
    {},
    {"branches": ("o",)},
    {"branches": ("k", "v"), "alpha": 3},
    {"branches": ("o", "q", "v", "k"), "rank": 3, "delta_init": "random"},
    {**PRESETS["msw"], "layers": (1,)},
    {**PRESETS["ssw"], "layers": "front:1", "delta_init": "zero"},
    {"granularity": "sentence", "update_rule": "lambda_outside", "couple_lambda": False, "beta_bias": -3.0},
    {"update_rule": "no_lambda", "gates": "head", "state_heads": 2},
    {"couple_lambda": False, "gates": "head", "layers": "back:2"},
    {"delta_scale": "layer", "delta_scale_init": 0.5, "delta_scale_max": 3.0},
    {"delta_scale": "branch", "o_norm": True, "o_norm_eps": 1e-5, "layers": (1, 0)},
]


@pytest.mark.parametrize(
    ("name", "options"), [*(("qwen3", options) for options in OURS), ("smollm3", OURS[1])], ids=str
)
def test_every_adapter_of_our_format_round_trips(name, options, bases, tmp_path):
    base = bases[name]
    model = AutoModelForCausalLM.from_pretrained(base)
    config = DeltaMemConfig(**{"rank": 4, **options})
    randomise(attach(model, config))
    save_adapter(model, tmp_path / "ours")
    result = convert(tmp_path / "ours", tmp_path / "reference", to="reference")
    assert result.dtypes == ("float32",)
    reference_config = json.loads((tmp_path / "reference" / REFERENCE_CONFIG).read_text())
    assert list(reference_config) == list(DEFAULTS)
    of_off = [name for name in read_tensors(tmp_path / "reference") if name.split(".")[-1] in off(config)]
    assert len(of_off) == len(off(config)) * len(read_adapter(tmp_path / "ours").layer_indices)

    convert(tmp_path / "reference", tmp_path / "back", base=str(base))
    ours, back = read_adapter(tmp_path / "ours"), read_adapter(tmp_path / "back")
    assert_same_tensors(weights_of(back), weights_of(ours))
    assert back.base == ours.base
    # an adapter on some layers comes back on the same layers
    layers = config.layers if config.layer_part is None else tuple(ours.layer_indices)
    assert back.config == replace(config, layers=layers)
    ids = tokens(1, 6)
    if config.granularity == "token":
        with torch.no_grad():
            assert torch.equal(load(tmp_path / "back")(ids).logits, load(tmp_path / "ours")(ids).logits)


def off(config: DeltaMemConfig) -> set[str]:
    return {f"delta_{branch}_proj" for branch in "qkvo" if branch not in config.branches}


def test_fresh_adapters_are_the_same_in_both_formats(bases, tmp_path):
    torch.manual_seed(0)
    create_adapter(str(bases["qwen3"]), DeltaMemConfig.preset("tsw"), tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "reference", to="reference")
    config = json.loads((tmp_path / "reference" / REFERENCE_CONFIG).read_text())
    assert config == {**DEFAULTS, "delta_heads": ["q", "o"], "output_init": "base_slice_fixed"}
    for name, tensor in read_tensors(tmp_path / "reference").items():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, name  # no bytes beyond the tensors


def test_our_config_takes_precedence_over_the_kept_fields(reference, tmp_path):
    change_config(reference, online_gain=0.1)
    convert(reference, tmp_path / "ours", base=BASE)
    config = json.loads((tmp_path / "ours" / CONFIG_FILE).read_text())
    config["mechanism"] |= {"alpha": 4.0, "update_rule": "no_lambda", "granularity": "message", "layers": [0, 1]}
    (tmp_path / "ours" / CONFIG_FILE).write_text(json.dumps(config))
    convert(tmp_path / "ours", tmp_path / "back", to="reference")
    expected = change_config(
        reference,
        alpha=4.0,
        state_update_mode="no_lambda",
        memory_write_granularity="message_mean",
        target_layers=[0, 1],
    )
    assert json.loads((tmp_path / "back" / REFERENCE_CONFIG).read_text()) == expected
    assert expected["online_gain"] == 0.1


def test_weights_trained_after_conversion_are_not_rounded(reference, tmp_path):
    change_tensors(reference, lambda tensors: {name: tensor.bfloat16() for name, tensor in tensors.items()})
    convert(reference, tmp_path / "ours", base=BASE)
    tensors = load_file(tmp_path / "ours" / WEIGHTS_FILE)
    tensors["layers.1.query.weight"] += 1e-6
    save_file(tensors, tmp_path / "ours" / WEIGHTS_FILE)
    result = convert(tmp_path / "ours", tmp_path / "back", to="reference")
    assert result.dtypes == ("float32",)
    assert torch.equal(read_tensors(tmp_path / "back")[QUERY], tensors["layers.1.query.weight"])


def test_saving_a_loaded_adapter_drops_the_kept_fields(reference, tmp_path):
    convert(reference, tmp_path / "ours", base=BASE)
    save_adapter(load(tmp_path / "ours"), tmp_path / "again")
    assert read_adapter(tmp_path / "again").reference is None
    convert(tmp_path / "again", tmp_path / "back", to="reference")
    assert_same_adapter(tmp_path / "back", reference)  # all of its fields have the usual values


def test_the_random_state_is_unchanged(reference, tmp_path):
    before = torch.get_rng_state()
    convert(reference, tmp_path / "ours", base=BASE)
    convert(tmp_path / "ours", tmp_path / "back", to="reference")
    assert torch.equal(torch.get_rng_state(), before)


def test_every_changed_option_reaches_the_references_config(tmp_path):
    for options in OURS:
        config = DeltaMemConfig(**options)
        actual = mechanism_of(config_of(config, [0]), tmp_path)
        expected = {**config.to_dict(), **({"layers": [0]} if config.layer_part else {})}
        assert actual.to_dict() == expected

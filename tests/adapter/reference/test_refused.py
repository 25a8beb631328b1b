"""A conversion that would lose something raises, names it, and leaves every folder unchanged."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from adapter.reference.adapters import (
    BASE,
    CASE,
    OFF,
    QUERY,
    assert_refused,
    assert_same_adapter,
    change_config,
    change_tensors,
)
from helpers.parity_cases import FOLDER
from helpers.tiny import listing

from deltamem_tool import convert
from deltamem_tool.adapter.config_file import CONFIG_FILE, WEIGHTS_FILE
from deltamem_tool.adapter.reference.config import REFERENCE_CONFIG, mechanism_of
from deltamem_tool.adapter.reference.convert import REFERENCE_WEIGHTS
from deltamem_tool.errors import AdapterError, ArchitectureError, ConfigError, DeltaMemError, HubError


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_memory_partitions": 2}, "num_memory_partitions is 2, and only 1 is supported"),
        ({"memory_readout_mode": "synthetic_kv"}, "memory_readout_mode is 'synthetic_kv', and only 'delta'"),
        ({"memory_reader_layers": [1]}, "memory_reader_layers"),
        ({"latent_gate_init": 0.5}, "latent_gate_init"),
        ({"target_modules": ["mlp"]}, "target_modules"),
        ({"normalize_qk": False}, "normalize_qk is False"),
        ({"normalize_qk": 1}, "normalize_qk is 1"),
        ({"synthetic_memory_slots": True}, "synthetic_memory_slots is True"),
        ({"delta_scale_parameterization": "raw"}, "delta_scale_parameterization"),
        ({"memory_write_granularity": "message_proposals"}, "memory_write_granularity is 'message_proposals', not one"),
        ({"state_update_mode": "affine"}, "state_update_mode must be 'standard', 'lambda_outside' or"),
        ({"state_update_mode": ["standard"]}, "state_update_mode must be 'standard'"),
        ({"state_update_mode": "no_lambda", "couple_lambda": False}, "state_update_mode no_lambda has no λ"),
        (
            {"delta_o_rmsnorm": True, "delta_heads": ["q"]},
            "delta_o_rmsnorm normalises the correction of o, which",
        ),
        ({"delta_heads": []}, "delta_heads must not be empty"),
        ({"delta_heads": ["q", "gate"]}, "delta_heads has 'gate'"),
        ({"delta_heads": "q,o"}, "delta_heads is 'q,o', not a list"),
        ({"target_layers": 1}, "target_layers is 1, not a list"),
        ({"target_layers": [-1]}, "target_layers must be indices"),
        ({"rank": 65}, "rank must be 64 or less, not 65"),
        ({"num_state_heads": 0}, "num_state_heads must be 1 or more"),
        ({"num_state_heads": 10**18}, "num_state_heads must be 256 or less"),
        ({"alpha": 10**400}, "alpha must be a number"),
        ({"online_gain": "much"}, "online_gain is 'much', not a number"),
        ({"online_gain": float("nan")}, "online_gain is nan"),
        ({"output_init": {}}, "output_init is {}"),
        ({"rankwise_gates": 1}, "rankwise_gates is 1"),
        ({"trainable_delta_scale": "yes"}, "trainable_delta_scale"),
        ({"delta_scale_init": 3.0}, "delta_scale_init must be less than delta_scale_max"),
        ({"online_gian": 0.1}, "'online_gian' is not known (did you mean 'online_gain'?)"),
        ({"rank": ...}, "rank is missing"),
        ({"delta_heads": ...}, "delta_heads is missing"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_an_unsupported_config_raises(changes, says, reference, tmp_path):
    change_config(reference, **changes)
    assert_refused(reference, tmp_path, says, REFERENCE_CONFIG)


def test_another_value_of_any_fixed_field_raises(tmp_path):
    """If nothing checked a field, its mechanism would be lost silently."""
    config = json.loads((CASE / "adapter" / REFERENCE_CONFIG).read_text())
    exempt = {"base_slice_ref_width", "online_gain"}
    for name, value in config.items():
        other = {bool: lambda v: not v, str: lambda v: v + "x", list: lambda v: [*v, 7]}.get(
            type(value), lambda v: v + 9
        )
        try:
            changed = mechanism_of({**config, name: other(value)}, tmp_path)
        except AdapterError as error:
            assert name in str(error)
        else:
            assert name in exempt or changed != mechanism_of(config, tmp_path), name


def test_the_error_names_every_problem_of_a_config(reference, tmp_path):
    change_config(reference, slot_read_top_k=3, num_memory_partitions=4, hello=1)
    assert_refused(reference, tmp_path, "slot_read_top_k", "num_memory_partitions", "'hello' is not known")


def other_shape(tensors):
    tensors[QUERY] = tensors[QUERY][:, :-1].clone()


CHANGES = {
    "missing": (lambda t: {key: value for key, value in t.items() if key != QUERY}, [f"missing {QUERY}"]),
    "extra": (lambda t: {**t, "model.layers.9.self_attn.beta_bias": t[QUERY]}, ["extra 'model.layers.9"]),
    "own λ": (lambda t: {**t, "model.layers.1.self_attn.lambda_bias": torch.zeros(8)}, ["extra", "lambda_bias"]),
    "prefix": (lambda t: {f"base_model.{key}": value for key, value in t.items()}, ["extra 'base_model.", "missing"]),
    "no text": (lambda t: {**t, 7: t[QUERY]}, ["extra 7"]),
    "escape": (lambda t: {**t, "\x1b[2J": t[QUERY]}, ["extra '\\x1b[2J'"]),
    "shape": (other_shape, [QUERY, "is [8, 47], not [8, 48]"]),
    "NaN": (lambda t: t[QUERY].view(-1)[3:4].fill_(float("nan")) and None, [QUERY, "NaN"]),
    "integers": (lambda t: {**t, QUERY: t[QUERY].int()}, [QUERY, "torch.int32"]),
    "float64": (lambda t: {**t, QUERY: t[QUERY].double()}, [QUERY, "torch.float64"]),
    "sparse": (lambda t: {**t, QUERY: t[QUERY].to_sparse()}, [QUERY, "not a dense CPU tensor"]),
    "meta": (lambda t: {**t, QUERY: t[QUERY].to("meta")}, [QUERY, "not a dense CPU tensor"]),
    "no tensor": (lambda t: {**t, QUERY: [1.0, 2.0]}, [QUERY, "is a list, not a tensor"]),
    "nested": (lambda t: {"state_dict": t}, ["extra 'state_dict'", "missing"]),
    "off": (lambda t: t[OFF][0, 0].fill_(1e-30) and None, [OFF, "not zero", "delta_heads", "lost"]),
    "a list": (lambda t: list(t.values()), ["list, not a dictionary"]),
    "a tensor": (lambda t: t[QUERY], ["Tensor, not a dictionary"]),
    "endless": (lambda t: {**t, QUERY: torch.zeros(1).expand(10**7, 10**7)}, [QUERY, "is [10000000, 10000000]"]),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.filterwarnings("ignore:Sparse")
def test_invalid_weights_raise(name, reference, tmp_path):
    change, says = CHANGES[name]
    change_tensors(reference, change)
    assert_refused(reference, tmp_path, REFERENCE_WEIGHTS, *says)


def test_weights_that_do_not_match_the_config_raise(reference, tmp_path):
    for changes in ({"rank": 4}, {"couple_lambda": False}, {"num_state_heads": 2}, {"target_layers": [0]}):
        (reference / REFERENCE_CONFIG).write_bytes((CASE / "adapter" / REFERENCE_CONFIG).read_bytes())
        change_config(reference, **changes)
        assert_refused(reference, tmp_path, "does not fit its config")


def test_a_base_that_does_not_fit_raises(reference, bases, tmp_path):
    assert_refused(reference, tmp_path, "do not record it", "--base", base=None)
    assert_refused(reference, tmp_path, QUERY, "is [8, 48], not [8, 32]", base=str(bases["qwen3"]))
    assert_refused(reference, tmp_path, "no/where", base="./no/where", error=HubError)
    change_config(reference, target_layers=[7])
    assert_refused(reference, tmp_path, "[7]", error=ArchitectureError)


def test_converting_back_needs_the_recorded_base(tmp_path):
    base = tmp_path / "base"
    shutil.copytree(BASE, base)
    base.chmod(0o755)
    convert(CASE / "adapter", tmp_path / "ours", base=str(base))
    base.rename(tmp_path / "moved")
    assert_refused(tmp_path / "ours", tmp_path, str(base), base=None, to="reference", error=HubError)
    convert(tmp_path / "ours", tmp_path / "back", base=str(tmp_path / "moved"), to="reference")
    assert_same_adapter(tmp_path / "back", CASE / "adapter")
    shutil.rmtree(tmp_path / "back")
    other = str(FOLDER / "tsw_qkvo_smollm3" / "base")
    assert_refused(tmp_path / "ours", tmp_path, "another base model", base=other, to="reference")


def test_damaged_reference_fields_raise(reference, tmp_path):
    convert(reference, tmp_path / "ours", base=BASE)
    file = tmp_path / "ours" / CONFIG_FILE
    config = json.loads(file.read_text())
    reference_config = config["reference"]
    for damage in (
        {},
        {**reference_config, "dtype": "int8"},
        {**reference_config, "dtype": ["float32"]},
        {**reference_config, "config": {"rank": 8}},
        {**reference_config, "other_dtypes": {QUERY: "complex64"}},
        {**reference_config, "other_dtypes": []},
    ):
        file.write_text(json.dumps({**config, "reference": damage}))
        assert_refused(tmp_path / "ours", tmp_path, "ours", to="reference")
    file.write_text(json.dumps({**config, "reference": 7}))
    assert_refused(tmp_path / "ours", tmp_path, "reference", to="reference")
    del config["reference"]
    file.write_text(json.dumps(config))
    convert(tmp_path / "ours", tmp_path / "back", to="reference")


def test_an_adapter_of_the_wrong_format_raises(reference, tmp_path):
    convert(reference, tmp_path / "ours", base=BASE)
    assert_refused(tmp_path / "ours", tmp_path, "not an adapter of the reference", "--to reference")
    assert_refused(reference, tmp_path, "already", "--to", to="reference")
    assert_refused(tmp_path, tmp_path, "not an adapter of the reference", REFERENCE_CONFIG)
    assert_refused(tmp_path / "no", tmp_path, "There is no adapter folder", error=HubError)
    assert_refused(reference, tmp_path, "'peft'", "deltamem, reference", to="peft", error=ConfigError)
    (reference / REFERENCE_WEIGHTS).unlink()
    assert_refused(reference, tmp_path, REFERENCE_WEIGHTS)


def test_attention_modules_of_another_name_raise(tmp_path, monkeypatch):
    """The reference names its tensors after its modules, so those of another model would belong to none."""
    from deltamem_tool.base_model import checkpoint as room

    attention_layers = room.attention_layers

    def renamed(model):
        import dataclasses

        return [dataclasses.replace(layer, name=f"decoder.{layer.index}.attn") for layer in attention_layers(model)]

    monkeypatch.setattr(room, "attention_layers", renamed)
    assert_refused(CASE / "adapter", tmp_path, "decoder.0.attn", error=ArchitectureError)


def test_an_existing_folder_is_not_replaced(reference, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("")
    before = listing(tmp_path)
    with pytest.raises(DeltaMemError, match="already exists"):
        convert(reference, out, base=BASE)
    for source, base in ((reference, BASE), (reference, str(reference))):
        with pytest.raises(DeltaMemError, match="would be replaced"):
            convert(source, reference, base=base, overwrite=True)
    with pytest.raises(DeltaMemError, match="would be replaced"):
        convert(reference, tmp_path, base=BASE, overwrite=True)
    assert listing(tmp_path) == before
    convert(reference, out, base=BASE, overwrite=True)
    assert set(listing(out)) == {CONFIG_FILE, WEIGHTS_FILE}
    convert(out, reference, to="reference", overwrite=True)
    assert_same_adapter(reference, CASE / "adapter")


def test_a_failed_conversion_leaves_nothing(reference, tmp_path, monkeypatch):
    convert(reference, tmp_path / "ours", base=BASE)
    before = listing(tmp_path)
    monkeypatch.setattr(torch, "save", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        convert(tmp_path / "ours", tmp_path / "back", to="reference")
    assert listing(tmp_path) == before

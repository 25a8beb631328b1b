"""Adapters of the reference implementation: the same bits there and back, or a refusal that names what is lost."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from parity_cases import CASES, FOLDER
from safetensors.torch import load_file, save_file
from tiny import listing, randomise, save_checkpoint, tokens
from transformers import AutoModelForCausalLM

from deltamem_tool import DeltaMemConfig, attach, convert, load, save_adapter
from deltamem_tool.adapter import CONFIG_FILE, WEIGHTS_FILE, create_adapter, read_adapter
from deltamem_tool.config import PRESETS
from deltamem_tool.errors import AdapterError, ArchitectureError, ConfigError, DeltaMemError, HubError
from deltamem_tool.reference import NAMES, REFERENCE_WEIGHTS
from deltamem_tool.reference_config import DEFAULTS, REFERENCE_CONFIG, config_of, mechanism_of

CASE = FOLDER / "tsw_qo_qwen3"
BASE = str(CASE / "base")
QUERY = "model.layers.1.self_attn.memory_q_proj"
OFF = "model.layers.0.self_attn.delta_k_proj"  # k is not in delta_heads


@pytest.fixture
def reference(tmp_path):
    """A copy of a reference adapter that may be changed; `BASE` is its base."""
    return writable(CASE / "adapter", tmp_path / "reference")


def writable(source: Path, folder: Path) -> Path:
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / REFERENCE_WEIGHTS, weights_only=True)


def change_tensors(folder: Path, change) -> None:
    """`change(tensors)` in place, or what it returns instead."""
    tensors = read_tensors(folder)
    changed = change(tensors)
    torch.save(tensors if changed is None else changed, folder / REFERENCE_WEIGHTS)


def change_config(folder: Path, **changes) -> dict:
    said = {**json.loads((folder / REFERENCE_CONFIG).read_text()), **changes}
    said = {name: value for name, value in said.items() if value is not ...}
    (folder / REFERENCE_CONFIG).write_text(json.dumps(said, indent=2))
    return said


def assert_same_adapter(found: Path, expected: Path) -> None:
    """Byte for byte in the config; names, order, types, shapes and bits of the weights."""
    assert (found / REFERENCE_CONFIG).read_bytes() == (expected / REFERENCE_CONFIG).read_bytes()
    assert set(listing(found)) == {REFERENCE_CONFIG, REFERENCE_WEIGHTS}
    assert_same_tensors(read_tensors(found), read_tensors(expected))


def assert_same_tensors(found, expected) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


# There and back


TYPES = [*((case, dtype) for case in CASES for dtype in (torch.float32, torch.bfloat16)), (CASES[0], torch.float16)]


@pytest.mark.parametrize(("case", "dtype"), TYPES, ids=str)
def test_every_reference_adapter_comes_back(case, dtype, tmp_path):
    source = writable(FOLDER / case / "adapter", tmp_path / "source")
    change_tensors(source, lambda tensors: {name: tensor.to(dtype) for name, tensor in tensors.items()})
    done = convert(source, tmp_path / "ours", base=str(FOLDER / case / "base"))
    assert done.dtypes == (str(dtype).removeprefix("torch."),) and done.format == "deltamem"
    ours = read_adapter(tmp_path / "ours")
    assert done.parameters == ours.num_parameters()
    theirs = read_tensors(source)
    for name, tensor in ours.tensors.items():
        _, layer, own = name.split(".", 2)
        original = next(key for key, value in NAMES.items() if value == own)
        assert torch.equal(tensor, theirs[f"model.layers.{layer}.self_attn.{original}"].float())
    back = convert(tmp_path / "ours", tmp_path / "back", to="reference")
    assert_same_adapter(tmp_path / "back", source)
    assert back.dtypes == done.dtypes and back.base == done.base
    assert back.parameters == sum(tensor.numel() for tensor in theirs.values())


def test_weights_of_several_types_come_back(reference, tmp_path):
    def mixed(tensors):
        return {name: tensor.bfloat16() if "proj" in name else tensor for name, tensor in tensors.items()}

    change_tensors(reference, mixed)
    done = convert(reference, tmp_path / "ours", base=BASE)
    assert done.dtypes == ("bfloat16", "float32")
    convert(tmp_path / "ours", tmp_path / "back", to="reference")
    assert_same_adapter(tmp_path / "back", reference)


def test_weights_in_any_order_and_shape_of_storage_are_read(reference, tmp_path):
    convert(reference, tmp_path / "a", base=BASE)
    change_tensors(reference, lambda tensors: {name: tensors[name].t().clone().t() for name in reversed(tensors)})
    convert(reference, tmp_path / "b", base=BASE)
    assert (tmp_path / "a" / WEIGHTS_FILE).read_bytes() == (tmp_path / "b" / WEIGHTS_FILE).read_bytes()


def test_fields_that_we_do_not_use_come_back(reference, tmp_path):
    """What says how a fresh Δ starts, the order of fields, and a shorter config of an older version."""
    said = change_config(
        reference, online_gain=0.1, base_slice_ref_width=4, output_init="base_slice", alpha=16, latent_gate_init=...
    )
    (reference / REFERENCE_CONFIG).write_text(json.dumps(dict(reversed(said.items())), indent=2))
    convert(reference, tmp_path / "ours", base=BASE)
    convert(tmp_path / "ours", tmp_path / "back", to="reference")
    assert_same_adapter(tmp_path / "back", reference)


def test_an_older_config_has_the_references_defaults(tmp_path):
    least = {"rank": 4, "delta_heads": ["o"]}
    assert mechanism_of(least, tmp_path) == DeltaMemConfig(rank=4, heads=("o",))
    assert mechanism_of(DEFAULTS, tmp_path) == DeltaMemConfig(heads=("q", "k", "v", "o"))
    published = json.loads((CASE / "adapter" / REFERENCE_CONFIG).read_text())
    assert list(published) == list(DEFAULTS)
    for name in ("rank", "delta_heads"):
        with pytest.raises(AdapterError, match=f"{name} is missing"):
            mechanism_of({key: value for key, value in least.items() if key != name}, tmp_path)


OURS = [
    {},
    {"heads": ("o",)},
    {"heads": ("k", "v"), "alpha": 3},
    {"heads": ("o", "q", "v", "k"), "rank": 3, "delta_init": "random"},
    {**PRESETS["msw"], "layers": (1,)},
    {**PRESETS["ssw"], "layers": "front:1", "delta_init": "zero"},
    {"granularity": "sentence", "update_rule": "lambda_outside", "couple_lambda": False, "beta_bias": -3.0},
    {"update_rule": "no_lambda", "gates": "head", "state_heads": 2},
    {"couple_lambda": False, "gates": "head", "layers": "back:2"},
    {"delta_scale": "layer", "delta_scale_init": 0.5, "delta_scale_max": 3.0},
    {"delta_scale": "branch", "o_norm": True, "o_norm_eps": 1e-5, "layers": (1, 0)},
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {name: save_checkpoint(folder / name, name=name) for name in ("qwen3", "smollm3")}


@pytest.mark.parametrize(
    ("name", "options"), [*(("qwen3", options) for options in OURS), ("smollm3", OURS[1])], ids=str
)
def test_every_adapter_of_ours_comes_back(name, options, bases, tmp_path):
    base = bases[name]
    model = AutoModelForCausalLM.from_pretrained(base)
    config = DeltaMemConfig(**{"rank": 4, **options})
    randomise(attach(model, config))
    save_adapter(model, tmp_path / "ours")
    done = convert(tmp_path / "ours", tmp_path / "reference", to="reference")
    assert done.dtypes == ("float32",)
    said = json.loads((tmp_path / "reference" / REFERENCE_CONFIG).read_text())
    assert list(said) == list(DEFAULTS)
    of_off = [name for name in read_tensors(tmp_path / "reference") if name.split(".")[-1] in off(config)]
    assert len(of_off) == len(off(config)) * len(read_adapter(tmp_path / "ours").layer_indices)

    convert(tmp_path / "reference", tmp_path / "back", base=str(base))
    ours, back = read_adapter(tmp_path / "ours"), read_adapter(tmp_path / "back")
    assert_same_tensors(dict(back.tensors), dict(ours.tensors))
    assert back.base == ours.base
    # a part of the layers comes back as the layers that it is
    layers = config.layers if config.layer_part is None else tuple(ours.layer_indices)
    assert back.config == DeltaMemConfig(**{**config.to_dict(), "layers": layers})
    ids = tokens(1, 6)
    if config.granularity == "token":
        with torch.no_grad():
            assert torch.equal(load(tmp_path / "back")(ids).logits, load(tmp_path / "ours")(ids).logits)


def off(config: DeltaMemConfig) -> set[str]:
    return {f"delta_{branch}_proj" for branch in "qkvo" if branch not in config.heads}


def test_fresh_adapters_are_the_same_in_both_formats(bases, tmp_path):
    torch.manual_seed(0)
    create_adapter(str(bases["qwen3"]), DeltaMemConfig.preset("tsw"), tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "reference", to="reference")
    said = json.loads((tmp_path / "reference" / REFERENCE_CONFIG).read_text())
    assert said == {**DEFAULTS, "delta_heads": ["q", "o"], "output_init": "base_slice_fixed"}
    for name, tensor in read_tensors(tmp_path / "reference").items():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, name  # the file holds no more than it says


def test_our_config_wins_over_what_was_kept(reference, tmp_path):
    change_config(reference, online_gain=0.1)
    convert(reference, tmp_path / "ours", base=BASE)
    said = json.loads((tmp_path / "ours" / CONFIG_FILE).read_text())
    said["mechanism"] |= {"alpha": 4.0, "update_rule": "no_lambda", "granularity": "message", "layers": [0, 1]}
    (tmp_path / "ours" / CONFIG_FILE).write_text(json.dumps(said))
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


def test_weights_that_were_trained_on_are_not_rounded(reference, tmp_path):
    change_tensors(reference, lambda tensors: {name: tensor.bfloat16() for name, tensor in tensors.items()})
    convert(reference, tmp_path / "ours", base=BASE)
    tensors = load_file(tmp_path / "ours" / WEIGHTS_FILE)
    tensors["layers.1.query.weight"] += 1e-6
    save_file(tensors, tmp_path / "ours" / WEIGHTS_FILE)
    done = convert(tmp_path / "ours", tmp_path / "back", to="reference")
    assert done.dtypes == ("float32",)
    assert torch.equal(read_tensors(tmp_path / "back")[QUERY], tensors["layers.1.query.weight"])


def test_a_loaded_adapter_saves_without_what_was_kept(reference, tmp_path):
    convert(reference, tmp_path / "ours", base=BASE)
    save_adapter(load(tmp_path / "ours"), tmp_path / "again")
    assert read_adapter(tmp_path / "again").reference is None
    convert(tmp_path / "again", tmp_path / "back", to="reference")
    assert_same_adapter(tmp_path / "back", reference)  # all of its fields are usual ones


def test_the_random_state_is_left_alone(reference, tmp_path):
    before = torch.get_rng_state()
    convert(reference, tmp_path / "ours", base=BASE)
    convert(tmp_path / "ours", tmp_path / "back", to="reference")
    assert torch.equal(torch.get_rng_state(), before)


def test_every_changed_option_reaches_the_references_config(tmp_path):
    for options in OURS:
        config = DeltaMemConfig(**options)
        found = mechanism_of(config_of(config, [0]), tmp_path)
        expected = {**config.to_dict(), **({"layers": [0]} if config.layer_part else {})}
        assert found.to_dict() == expected


# Refused


def assert_refused(source: Path, tmp_path: Path, *says: str, base: str | None = BASE, error=AdapterError, **options):
    before = listing(tmp_path)
    with pytest.raises(error) as caught:
        convert(source, tmp_path / "out", base=base, **options)
    assert caught.value.what and caught.value.next
    for word in says:
        assert word in str(caught.value)
    assert listing(tmp_path) == before


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
        ({"state_update_mode": "affine"}, "state_update_mode must be one of"),
        ({"state_update_mode": ["standard"]}, "state_update_mode must be one of"),
        ({"state_update_mode": "no_lambda", "couple_lambda": False}, "state_update_mode no_lambda has no λ"),
        ({"delta_o_rmsnorm": True, "delta_heads": ["q"]}, "delta_o_rmsnorm has nothing to act on"),
        ({"delta_heads": []}, "delta_heads names no projection"),
        ({"delta_heads": ["q", "gate"]}, "delta_heads has 'gate'"),
        ({"delta_heads": "q,o"}, "delta_heads is 'q,o', not a list"),
        ({"target_layers": 1}, "target_layers is 1, not a list"),
        ({"target_layers": [-1]}, "target_layers must be indices"),
        ({"rank": 65}, "rank must be 1 to 64"),
        ({"num_state_heads": 0}, "num_state_heads must be 1 to 256"),
        ({"num_state_heads": 10**18}, "num_state_heads must be 1 to 256"),
        ({"alpha": 10**400}, "alpha must be a positive number"),
        ({"online_gain": "much"}, "online_gain is 'much', not a number"),
        ({"online_gain": float("nan")}, "online_gain is nan"),
        ({"output_init": {}}, "output_init is {}"),
        ({"rankwise_gates": 1}, "rankwise_gates is 1"),
        ({"trainable_delta_scale": "yes"}, "trainable_delta_scale"),
        ({"delta_scale_init": 3.0}, "delta_scale_init, 3.0, must be less than delta_scale_max"),
        ({"online_gian": 0.1}, "'online_gian' is not known (is 'online_gain' meant?)"),
        ({"rank": ...}, "rank is missing"),
        ({"delta_heads": ...}, "delta_heads is missing"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_config_that_is_not_ours_to_run(changes, says, reference, tmp_path):
    change_config(reference, **changes)
    assert_refused(reference, tmp_path, says, REFERENCE_CONFIG)


def test_every_archived_field_is_held_to_its_only_value(tmp_path):
    """A field that nothing looks at would be a mechanism that is silently lost."""
    said = json.loads((CASE / "adapter" / REFERENCE_CONFIG).read_text())
    kept = {"base_slice_ref_width", "online_gain"}
    for name, value in said.items():
        other = {bool: lambda v: not v, str: lambda v: v + "x", list: lambda v: [*v, 7]}.get(
            type(value), lambda v: v + 9
        )
        try:
            changed = mechanism_of({**said, name: other(value)}, tmp_path)
        except AdapterError as error:
            assert name in str(error)
        else:
            assert name in kept or changed != mechanism_of(said, tmp_path), name


def test_all_that_is_wrong_with_a_config_is_named(reference, tmp_path):
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
    "sparse": (lambda t: {**t, QUERY: t[QUERY].to_sparse()}, [QUERY, "no plain values"]),
    "meta": (lambda t: {**t, QUERY: t[QUERY].to("meta")}, [QUERY, "no plain values"]),
    "no tensor": (lambda t: {**t, QUERY: [1.0, 2.0]}, [QUERY, "is a list, not a tensor"]),
    "nested": (lambda t: {"state_dict": t}, ["extra 'state_dict'", "missing"]),
    "off": (lambda t: t[OFF][0, 0].fill_(1e-30) and None, [OFF, "not zero", "delta_heads", "lost"]),
    "a list": (lambda t: list(t.values()), ["list, not a dictionary"]),
    "a tensor": (lambda t: t[QUERY], ["Tensor, not a dictionary"]),
    "endless": (lambda t: {**t, QUERY: torch.zeros(1).expand(10**7, 10**7)}, [QUERY, "is [10000000, 10000000]"]),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.filterwarnings("ignore:Sparse")
def test_weights_that_do_not_fit(name, reference, tmp_path):
    change, says = CHANGES[name]
    change_tensors(reference, change)
    assert_refused(reference, tmp_path, REFERENCE_WEIGHTS, *says)


def test_config_and_weights_must_be_of_one_adapter(reference, tmp_path):
    for changes in ({"rank": 4}, {"couple_lambda": False}, {"num_state_heads": 2}, {"target_layers": [0]}):
        (reference / REFERENCE_CONFIG).write_bytes((CASE / "adapter" / REFERENCE_CONFIG).read_bytes())
        change_config(reference, **changes)
        assert_refused(reference, tmp_path, "does not fit its config")


def test_the_base_must_fit(reference, bases, tmp_path):
    assert_refused(reference, tmp_path, "do not record it", "--base", base=None)
    assert_refused(reference, tmp_path, QUERY, "is [8, 48], not [8, 32]", base=str(bases["qwen3"]))
    assert_refused(reference, tmp_path, "no/where", base="./no/where", error=HubError)
    change_config(reference, target_layers=[7])
    assert_refused(reference, tmp_path, "[7]", error=ArchitectureError)


def test_back_needs_the_base_that_was_recorded(tmp_path):
    base = tmp_path / "base"
    shutil.copytree(BASE, base)
    os.chmod(base, 0o755)
    convert(CASE / "adapter", tmp_path / "ours", base=str(base))
    base.rename(tmp_path / "moved")
    assert_refused(tmp_path / "ours", tmp_path, str(base), base=None, to="reference", error=HubError)
    convert(tmp_path / "ours", tmp_path / "back", base=str(tmp_path / "moved"), to="reference")
    assert_same_adapter(tmp_path / "back", CASE / "adapter")
    shutil.rmtree(tmp_path / "back")
    other = str(FOLDER / "tsw_qkvo_smollm3" / "base")
    assert_refused(tmp_path / "ours", tmp_path, "another base model", base=other, to="reference")


def test_what_was_kept_must_be_whole(reference, tmp_path):
    convert(reference, tmp_path / "ours", base=BASE)
    file = tmp_path / "ours" / CONFIG_FILE
    said = json.loads(file.read_text())
    kept = said["reference"]
    for damage in (
        {},
        {**kept, "dtype": "int8"},
        {**kept, "dtype": ["float32"]},
        {**kept, "config": {"rank": 8}},
        {**kept, "other_dtypes": {QUERY: "complex64"}},
        {**kept, "other_dtypes": []},
    ):
        file.write_text(json.dumps({**said, "reference": damage}))
        assert_refused(tmp_path / "ours", tmp_path, "ours", to="reference")
    file.write_text(json.dumps({**said, "reference": 7}))
    assert_refused(tmp_path / "ours", tmp_path, "reference", to="reference")
    del said["reference"]
    file.write_text(json.dumps(said))
    convert(tmp_path / "ours", tmp_path / "back", to="reference")


def test_the_other_format_is_told_apart(reference, tmp_path):
    convert(reference, tmp_path / "ours", base=BASE)
    assert_refused(tmp_path / "ours", tmp_path, "no adapter of the reference", "--to reference")
    assert_refused(reference, tmp_path, "already", "--to", to="reference")
    assert_refused(tmp_path, tmp_path, "no adapter of the reference", REFERENCE_CONFIG)
    assert_refused(tmp_path / "no", tmp_path, "There is no adapter folder", error=HubError)
    assert_refused(reference, tmp_path, "'peft'", "deltamem, reference", to="peft", error=ConfigError)
    (reference / REFERENCE_WEIGHTS).unlink()
    assert_refused(reference, tmp_path, REFERENCE_WEIGHTS)


def test_attention_of_another_name(tmp_path, monkeypatch):
    """The reference's tensors are called after its modules: another model's would be nobody's."""
    from deltamem_tool import reference as room

    found = room.attention_layers

    def renamed(model):
        import dataclasses

        return [dataclasses.replace(layer, name=f"decoder.{layer.index}.attn") for layer in found(model)]

    monkeypatch.setattr(room, "attention_layers", renamed)
    assert_refused(CASE / "adapter", tmp_path, "decoder.0.attn", error=ArchitectureError)


def test_nothing_is_replaced_unasked(reference, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("")
    before = listing(tmp_path)
    with pytest.raises(DeltaMemError, match="already there"):
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


def test_nothing_is_left_of_a_conversion_that_fails(reference, tmp_path, monkeypatch):
    convert(reference, tmp_path / "ours", base=BASE)
    before = listing(tmp_path)
    monkeypatch.setattr(torch, "save", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        convert(tmp_path / "ours", tmp_path / "back", to="reference")
    assert listing(tmp_path) == before


# Hostile and damaged pickles


class Hostile:
    """Makes a file where it is unpickled by a reader that runs what it reads."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def plain_pickle(what, file):
    file.write_bytes(pickle.dumps(what))


def old_torch(what, file):
    torch.save(what, file, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("write", [plain_pickle, torch.save, old_torch])
@pytest.mark.parametrize("place", ["whole", "beside", "key", "deep"])
def test_a_hostile_pickle_runs_nothing(write, place, reference, tmp_path):
    trap = tmp_path / "trap"
    hostile, tensors = Hostile(trap), read_tensors(reference)
    what = {
        "whole": hostile,
        "beside": {**tensors, "more": hostile},
        "key": {**tensors, hostile: tensors[QUERY]},
        "deep": {**tensors, QUERY: [[{"x": (hostile,)}]]},
    }[place]
    write(what, reference / REFERENCE_WEIGHTS)
    assert_refused(reference, tmp_path, "is refused", "nothing of it was run")
    assert not trap.exists()
    file = reference / REFERENCE_WEIGHTS  # the trap is one
    _ = pickle.loads(file.read_bytes()) if write is plain_pickle else torch.load(file, weights_only=False)
    assert trap.is_dir()


def test_a_refusal_does_not_tell_how_to_run_it(reference, tmp_path):
    torch.save({"a": Hostile(tmp_path / "trap")}, reference / REFERENCE_WEIGHTS)
    with pytest.raises(AdapterError) as caught:
        convert(reference, tmp_path / "out", base=BASE)
    assert "mkdir" in str(caught.value) and "weights_only" not in str(caught.value)
    assert len(str(caught.value).splitlines()) == 3


def test_a_pickle_that_a_variable_would_open(reference, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save({"a": Hostile(tmp_path / "trap")}, reference / REFERENCE_WEIGHTS)
    assert_refused(reference, tmp_path, "is refused")


def test_damaged_files(reference, tmp_path):
    weights, config = reference / REFERENCE_WEIGHTS, reference / REFERENCE_CONFIG
    whole = weights.read_bytes()
    for damaged in (
        b"",
        b"hello world, this is no pickle",
        pickle.dumps({"a": 1})[:-3],
        whole[: len(whole) // 2],
        whole[:-1],
    ):
        weights.write_bytes(damaged)
        assert_refused(reference, tmp_path, str(weights))
    weights.write_bytes(whole)
    for damaged in (b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000):
        config.write_bytes(damaged)
        assert_refused(reference, tmp_path, str(config))


def test_weights_in_torchs_older_format_are_read(reference, tmp_path):
    convert(reference, tmp_path / "a", base=BASE)
    old_torch(read_tensors(reference), reference / REFERENCE_WEIGHTS)
    convert(reference, tmp_path / "b", base=BASE)
    assert (tmp_path / "a" / WEIGHTS_FILE).read_bytes() == (tmp_path / "b" / WEIGHTS_FILE).read_bytes()

"""Invalid folders from untrusted sources are rejected before anything is loaded."""

from __future__ import annotations

import json
import pickle
import random
import shutil
import struct
from pathlib import Path

import pytest
import torch
from helpers.tiny import weights_of
from safetensors.torch import load_file, save_file

from deltamem_tool import MemoryState, load
from deltamem_tool.adapter import folder as adapter_folder
from deltamem_tool.adapter.config_file import CONFIG_FILE, WEIGHTS_FILE
from deltamem_tool.adapter.folder import read_adapter
from deltamem_tool.base_model.checkpoint import BaseCheckpoint
from deltamem_tool.errors import (
    AdapterError,
    DeltaMemError,
    MemoryStateError,
)
from deltamem_tool.io import safe_json as bounded
from deltamem_tool.io import tensor_header
from deltamem_tool.io.formats import update_command
from deltamem_tool.memory import file as memory_file

FIXTURE = Path(__file__).parents[1] / "fixtures" / "adapter-format-1"
MUTATIONS = 300


@pytest.fixture
def folder(tmp_path):
    """A valid adapter for the tests to damage."""
    return shutil.copytree(FIXTURE / "adapter", tmp_path / "adapter")


@pytest.fixture
def memory(tmp_path):
    return shutil.copy(FIXTURE / "memory.safetensors", tmp_path / "memory")


@pytest.fixture
def load_calls(monkeypatch):
    """The names of the functions that have loaded weights of adapters or memories, or base models."""
    calls = []
    for owner, name in ((adapter_folder, "deserialize"), (memory_file, "load"), (BaseCheckpoint, "load")):
        real = getattr(owner, name)
        monkeypatch.setattr(
            owner, name, lambda *args, name=name, real=real, **kw: (calls.append(name), real(*args, **kw))[1]
        )
    return calls


def load_it(folder):
    return load(folder, base=str(FIXTURE / "base"))


def change(folder, path, value):
    """Set one entry of the config, given its path."""
    config = json.loads((folder / CONFIG_FILE).read_text())
    *places, last = path.split(".")
    part = config
    for place in places:
        part = part[place]
    part[last] = value
    (folder / CONFIG_FILE).write_text(json.dumps(config))


def split(file):
    """The header of a safetensors file as a dictionary, and what follows it."""
    content = Path(file).read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join(file, header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    Path(file).write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_valid_folders_load(folder, memory, load_calls):
    load_it(folder)
    MemoryState.load(memory)
    assert load_calls == ["deserialize", "load", "load"]  # the adapter, its base, the memory


# Configs


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("format_version", 2, "adapter format 2"),
        ("format_version", 0, "not an adapter folder"),
        ("format_version", 1.0, "not an adapter folder"),
        ("base.fingerprint", "0" * 64, "another base model"),
        ("base.model_type", "llama", "another base model"),
        ("base.name", "a" * 5000, "too long"),
        ("base.name", "\x1b[2J", "control characters"),
        ("base.revision", "../../main", "revision"),
        ("base.more", 1, "damaged"),
        ("mechanism.rank", 10**9, "rank must be"),
        ("mechanism.rank", 2, "does not fit"),
        ("mechanism.state_heads", 10**9, "state_heads must be"),
        ("mechanism.layers", [10**9], "layers must be"),
        ("mechanism.layers", "front:" + "9" * 3000, "layers must be"),
        ("mechanism.layers", [0, 5], "missing layers.5"),
        ("mechanism.alpha", float("nan"), "NaN"),
        ("mechanism.alpha", float("inf"), "Infinity"),
    ],
)
def test_invalid_configs_raise_before_anything_is_loaded(folder, load_calls, path, value, says):
    change(folder, path, value)
    with pytest.raises(AdapterError, match=says) as refusal:
        load_it(folder)
    assert load_calls == [] and "\x1b" not in str(refusal.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (" " * (bounded.MAX_JSON_BYTES + 1), "larger than"),
        ("[" * 100_000 + "]" * 100_000, "too deep"),
        ('{"a":' * 70 + "1" + "}" * 70, "deeper than"),
        ('{"format_version": 1e999}', "too large"),
        ("1" * 5000, "not JSON"),
    ],
)
def test_hostile_configs_raise(folder, load_calls, content, says):
    (folder / CONFIG_FILE).write_text(content)
    with pytest.raises(AdapterError, match=says):
        load_it(folder)
    assert load_calls == []


def test_a_config_is_read_only_up_to_its_size_limit(tmp_path):
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ValueError, match="larger than"):
        bounded.read_json(tmp_path / "sparse")


def test_an_error_is_three_printable_lines(folder):
    change(folder, "mechanism.rank", "\u202e\x9b\n" + "x" * 100_000)
    with pytest.raises(AdapterError) as refusal:
        read_adapter(folder)
    message = str(refusal.value)
    assert message.count("\n") == 2 and len(message) < 10_000
    assert not {"\u202e", "\x9b"} & set(str(DeltaMemError("a\u202e\x9b\ud800")))


# Headers of weights

DAMAGED = "header is damaged, or the file is truncated"


def larger(header, data):
    name = next(name for name in header if name != "__metadata__")
    header[name]["shape"][0] += 1


def entry(**changes):
    def apply(header, data):
        header["layers.0.gate.bias"].update(changes)

    return apply


def overlapping(header, data):
    place = header["layers.0.gate.bias"]["data_offsets"]
    header["layers.0.gate.bias"]["data_offsets"] = [place[0] + 4, place[1] + 4]


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (larger, DAMAGED),
        (overlapping, DAMAGED),
        (entry(dtype="F16"), DAMAGED),
        (entry(dtype="F4"), DAMAGED),
        (entry(dtype=["F32"]), DAMAGED),
        (entry(shape=[-6]), DAMAGED),
        (entry(shape=[2**40, 0]), DAMAGED),
        (entry(shape=[True]), DAMAGED),
        (entry(shape=[1] * 9), DAMAGED),
        (entry(shape=6), DAMAGED),
        (entry(shape=[2, 3]), r"is \[2, 3\], not \[6\]"),
        (entry(data_offsets=[0]), DAMAGED),
        (entry(data_offsets=[0, 2**200]), DAMAGED),
        (lambda header, data: header.update({"x" * 257: header.pop("layers.0.gate.bias")}), "extra xxx"),
        (lambda header, data: header.update(more=header.pop("layers.0.gate.bias")), "extra more"),
        (lambda header, data: header.update(__metadata__={"a": 1}), DAMAGED),
    ],
)
def test_invalid_headers_raise_before_anything_is_loaded(folder, load_calls, damage, says):
    header, data = split(folder / WEIGHTS_FILE)
    damage(header, data)
    join(folder / WEIGHTS_FILE, header, data)
    with pytest.raises(AdapterError, match=says):
        load_it(folder)
    assert load_calls == []


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", DAMAGED),
        (struct.pack("<Q", 2**63) + b"{}", DAMAGED),
        (struct.pack("<Q", 10) + b"{}", DAMAGED),
        (struct.pack("<Q", 2) + b"[]", DAMAGED),
        (struct.pack("<Q", 2) + b"{}", "no layer"),
        (struct.pack("<Q", 2) + b"{]", "damaged"),
        (struct.pack("<Q", 2) + b"{}" + bytes(4), DAMAGED),
        (pickle.dumps({"layers": 1}), DAMAGED),
    ],
)
def test_files_that_are_not_weights_raise(folder, load_calls, content, says):
    (folder / WEIGHTS_FILE).write_bytes(content)
    with pytest.raises(AdapterError, match=says):
        load_it(folder)
    assert load_calls == []


def test_an_oversized_header_is_not_read(folder, load_calls, monkeypatch):
    header, data = split(folder / WEIGHTS_FILE)
    join(folder / WEIGHTS_FILE, json.dumps(header).encode() + b" " * tensor_header.MAX_HEADER_BYTES, data)
    with pytest.raises(AdapterError, match="header is larger"):
        load_it(folder)
    assert load_calls == []


def test_an_adapter_for_wider_layers_raises_before_the_base_is_loaded(folder, load_calls):
    """The config and the weights agree, and the base model's fingerprint matches, but its widths differ."""
    tensors = load_file(folder / WEIGHTS_FILE)
    for name, tensor in tensors.items():
        if name.endswith(("query.weight", "key.weight", "value.weight")):
            tensors[name] = torch.zeros(tensor.shape[0], 17)
    save_file(tensors, folder / WEIGHTS_FILE)
    with pytest.raises(AdapterError, match=r"is \[6, 17\], not \[6, 16\]"):
        load_it(folder)
    assert load_calls == []


def test_symbolic_links_of_the_hub_cache_are_followed(folder, tmp_path):
    (tmp_path / "blobs").mkdir()
    linked = tmp_path / "snapshots" / "main"
    linked.mkdir(parents=True)
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(tmp_path / "blobs" / str(number))
        (linked / file.name).symlink_to(f"../../blobs/{number}")
    assert load_it(linked) is not None


# Versions


@pytest.mark.parametrize(
    ("written_by", "line"),
    [
        ("99.1", "pip install -U 'deltamem-tool>=99.1'"),
        ("1.2.3rc1", "pip install -U 'deltamem-tool>=1.2.3rc1'"),
        ("2.0.dev3", "pip install -U 'deltamem-tool>=2.0.dev3'"),
        *(
            (other, "pip install -U deltamem-tool")
            for other in ("0.0.1", "9'; rm -rf ~; '", "9.9 evil", "9.9\n", "９.９", "9" * 50, 9.9, None, ["9.9"], "")
        ),
    ],
)
def test_the_error_names_the_version_to_install(folder, memory, written_by, line):
    assert update_command(written_by) == line
    change(folder, "format_version", 2)
    change(folder, "deltamem_version", written_by)
    with pytest.raises(AdapterError) as refusal:
        read_adapter(folder)
    assert refusal.value.next == f"Update deltamem-tool: {line}"
    if isinstance(written_by, str):
        header, data = split(memory)
        header["__metadata__"].update(format_version="2", deltamem_version=written_by)
        join(memory, header, data)
        with pytest.raises(MemoryStateError, match="of memory format 2") as refused:
            MemoryState.load(memory)
        assert refused.value.next == f"Update deltamem-tool: {line}"


def test_a_memory_records_the_version_that_wrote_it(memory, tmp_path):
    MemoryState.load(memory).save(tmp_path / "again")
    assert "deltamem_version" not in split(memory)[0]["__metadata__"]
    assert split(tmp_path / "again")[0]["__metadata__"]["deltamem_version"]


# Memories


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda h: h["layers.0.state"]["shape"].reverse(), "not square"),
        (lambda h: h["layers.0.state"].update(shape=[10**9, 2, 3, 3]), DAMAGED),
        (lambda h: h["layers.0.state"].update(dtype="I32"), "is not a float32 state"),
        (lambda h: h.update({"layers.００.state": h.pop("layers.0.state")}), "is not a float32 state"),
        (lambda h: h.update({"layers.01.state": h.pop("layers.0.state")}), "is not a float32 state"),
        (lambda h: h["__metadata__"].pop("adapter"), "no fingerprint"),
    ],
)
def test_memories_with_invalid_headers_raise(memory, load_calls, damage, says):
    header, data = split(memory)
    damage(header)
    join(memory, header, data)
    with pytest.raises(MemoryStateError, match=says):
        MemoryState.load(memory)
    assert load_calls == [] or says == "not square"


# Any byte


def mutated(content, chance):
    """`content` with some bytes changed, inserted or removed."""
    result = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 5))):
        at = chance.randrange(len(result))
        kind = chance.randrange(4)
        if kind == 0:
            result[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            result[at] = chance.choice(b'0159-.e"{}[],:\\\x00\xff')
        elif kind == 2:
            del result[at : at + chance.randrange(1, 9)]
        else:
            result[at:at] = result[at : at + chance.randrange(1, 40)]
    return bytes(result)


def same(actual, expected):
    return actual.keys() == expected.keys() and all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_a_mutated_adapter_raises_or_is_unchanged(folder, name):
    expected = weights_of(read_adapter(folder))
    content = (folder / name).read_bytes()
    until = len(content) if name == CONFIG_FILE else 8 + int.from_bytes(content[:8], "little")
    chance, refused = random.Random(0), 0
    for _ in range(MUTATIONS):
        (folder / name).write_bytes(mutated(content[:until], chance) + content[until:])
        try:
            adapter = read_adapter(folder)
        except DeltaMemError:
            refused += 1
        else:
            assert same(weights_of(adapter), expected)
    assert MUTATIONS / 2 < refused < MUTATIONS or name == WEIGHTS_FILE


def test_a_mutated_memory_raises_or_is_unchanged(memory):
    expected = MemoryState.load(memory)
    content = Path(memory).read_bytes()
    until = 8 + int.from_bytes(content[:8], "little")
    chance = random.Random(1)
    for _ in range(MUTATIONS):
        Path(memory).write_bytes(mutated(content[:until], chance) + content[until:])
        try:
            state = MemoryState.load(memory)
        except DeltaMemError:
            continue
        assert same(state.layers, expected.layers) and same(state.open_segments, expected.open_segments)

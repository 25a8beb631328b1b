"""Untrusted ONNX folders: rejected before ONNX Runtime loads them, wherever in the graph the problem is."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from deltamem_tool.config import MAX_RANK
from deltamem_tool.errors import DeltaMemError, ExportError
from deltamem_tool.onnx.contract import DATA_FILE, MANIFEST_FILE, MODEL_FILE
from deltamem_tool.onnx.manifest import Manifest
from deltamem_tool.onnx.runtime import validate as trust
from deltamem_tool.onnx.runtime.engine import OnnxModel
from deltamem_tool.onnx.runtime.validate import check_graph_file, check_onnx_folder

MUTATIONS = 300


@pytest.fixture
def folder(message_export, tmp_path):
    """A copy to damage."""
    return shutil.copytree(message_export.folder, tmp_path / "copy")


@pytest.fixture
def sessions(monkeypatch):
    """The models that ONNX Runtime has loaded."""
    models, real = [], onnxruntime.InferenceSession
    monkeypatch.setattr(
        onnxruntime, "InferenceSession", lambda *args, **kw: (models.append(args[0]), real(*args, **kw))[1]
    )
    return models


def graph_of(folder):
    return onnx.load(folder / MODEL_FILE, load_external_data=False)


def external(location=DATA_FILE, offset="0", length="4", name="w", **more):
    """A tensor of one float32 in another file."""
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, "offset": offset, "length": length, **more}.items():
        if value is not None:
            tensor.external_data.add(key=key, value=value)
    return tensor


def twice():
    tensor = external()
    tensor.external_data.add(key="location", value=DATA_FILE)
    return tensor


def plain(dims=(1,), dtype=TensorProto.FLOAT, **numbers):
    return TensorProto(name="w", data_type=dtype, dims=dims, **numbers)


OUTSIDE = ("../model.onnx.data", "/etc/passwd", "./model.onnx.data", "x/../model.onnx.data", "other.data", "", None)
IN_MEMORY = "*/_ORT_MEM_ADDR_/*"  # ONNX Runtime's own mark
BAD_TENSORS = [
    *(
        (external(location), "in a file other than")
        for location in (*OUTSIDE, IN_MEMORY, "MODEL.ONNX.DATA", "model.onnx.data\0")
    ),
    (external(offset="999999999999"), "does not fit"),
    (external(offset="-4"), "place"),
    (external(offset="9" * 30), "place"),
    (external(offset="０"), "place"),
    (external(length="8"), "does not fit"),
    (external(length="-1"), "place"),
    (external(basepath="/"), "place"),
    (twice(), "place"),
    (plain((2**62, 4), raw_data=b""), "shape"),
    (plain((-1,), raw_data=b""), "shape"),
    (plain((0, 2**40), raw_data=b""), "shape"),
    (plain((2**31 - 1,) * 4, raw_data=b"1234"), "does not fit"),
    (plain((2,), raw_data=b"1234"), "does not fit"),
    (plain((2,), float_data=[1.0]), "does not fit"),
    (plain((2,), int32_data=[1, 2]), "does not fit"),
    (plain((3,), TensorProto.INT4, int32_data=[1]), "does not fit"),
    (plain((1,), TensorProto.STRING, string_data=[b"x"]), "type"),
    (plain((1,), 99, raw_data=b"1"), "type"),
    (plain((1,), raw_data=b"1234", segment=TensorProto.Segment(begin=0, end=1)), "shape"),
]


def node(op="Identity", domain="", **attributes):
    return helper.make_node(op, [], ["x"], name="bad", domain=domain, **attributes)


def inner(tensor=None, *nodes):
    return helper.make_graph(nodes, "inner", [], [], initializer=[] if tensor is None else [tensor])


def in_initializer(model, tensor):
    model.graph.initializer.append(tensor)


def in_constant(model, tensor):
    model.graph.node.append(node("Constant", value=tensor))


def in_tensors(model, tensor):
    model.graph.node.add(op_type="Identity").attribute.add(name="many", type=9).tensors.append(tensor)


def in_branch(model, tensor):
    model.graph.node.append(node("If", then_branch=inner(tensor), else_branch=inner()))


def in_scan_in_loop(model, tensor):
    scan = node("Scan", body=inner(None, node("Constant", value=tensor)))
    model.graph.node.append(node("Loop", body=inner(None, scan)))


def in_graphs(model, tensor):
    model.graph.node.add(op_type="Identity").attribute.add(name="many", type=10).graphs.append(inner(tensor))


PLACES = [in_initializer, in_constant, in_tensors, in_branch, in_scan_in_loop, in_graphs]


def function(model):
    model.functions.add(name="f", domain="com.microsoft").node.append(node())


def sparse(model):
    model.graph.sparse_initializer.add().values.CopyFrom(plain((0,), raw_data=b""))


def sparse_constant(model):
    attribute = model.graph.node.add(op_type="Constant").attribute.add(name="sparse_value", type=11)
    attribute.sparse_tensor.values.CopyFrom(external("/etc/passwd"))


def deep(op, domain=""):
    return lambda model: model.graph.node.append(node("If", then_branch=inner(None, node(op, domain))))


BAD_GRAPHS = [
    (function, "functions"),
    (lambda model: model.training_info.add().algorithm.node.append(node()), "training"),
    (sparse, "sparse"),
    (sparse_constant, "sparse"),
    (lambda model: model.graph.node.append(node("PyOp", "ai.onnx.contrib")), "ai.onnx.contrib"),
    (deep("Anything", "com.evil"), "com.evil"),
    (deep("Anything", "com.microsoft.extensions"), "extensions"),
    (deep("PythonOp", "com.microsoft"), "PythonOp"),
    (deep("EPContext", "com.microsoft"), "EPContext"),
    (deep("PyOp"), "PyOp"),
    (lambda model: model.metadata_props.add(key="ort_config", value="{}"), "options"),
]


def refused(folder, sessions, says=None):
    with pytest.raises(ExportError, match=says) as refusal:
        OnnxModel(folder)
    assert sessions == [] and len(str(refusal.value).splitlines()) == 3


def test_valid_folders_load(folder, sessions):
    assert check_onnx_folder(folder) == OnnxModel(folder).manifest
    assert sessions == [str(folder / MODEL_FILE)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen3", "llama", "portable_export", "static_export"])
def test_exported_folders_pass_validation(kind, request):
    check_onnx_folder(request.getfixturevalue(kind).folder)


@pytest.mark.parametrize("place", PLACES)
def test_unsafe_tensors_raise_wherever_they_are(folder, sessions, place):
    original = graph_of(folder)
    for tensor, says in BAD_TENSORS:
        model = onnx.ModelProto()
        model.CopyFrom(original)
        place(model, tensor)
        (folder / MODEL_FILE).write_bytes(model.SerializeToString())
        refused(folder, sessions, says)


@pytest.mark.parametrize(("damage", "says"), BAD_GRAPHS)
def test_unsafe_graphs_raise(folder, sessions, damage, says):
    model = graph_of(folder)
    damage(model)
    (folder / MODEL_FILE).write_bytes(model.SerializeToString())
    refused(folder, sessions, says)


def test_every_tensor_of_an_exported_graph_is_checked(folder, sessions):
    """Each of its weights in turn refers to another file."""
    original = graph_of(folder)
    there = [i for i, tensor in enumerate(original.graph.initializer) if tensor.external_data]
    assert there
    for index in there:
        model = onnx.ModelProto()
        model.CopyFrom(original)
        model.graph.initializer[index].external_data[0].value = "../secret"
        (folder / MODEL_FILE).write_bytes(model.SerializeToString())
        refused(folder, sessions, "in a file other than")


def test_truncated_weights_raise(folder, sessions):
    os.truncate(folder / DATA_FILE, (folder / DATA_FILE).stat().st_size - 1)
    refused(folder, sessions, "does not fit")


def test_unknown_fields_of_a_graph_raise(folder, sessions):
    with (folder / MODEL_FILE).open("ab") as file:
        file.write(b"\xc2\x3e\x03abc")  # field 1000
    refused(folder, sessions, "does not know")


def test_a_file_that_is_not_a_graph_raises(folder, sessions, monkeypatch):
    for content in (b"\xff" * 100, b"\x3a\x80", b"PK\x03\x04", b"\x3a\x02" * 9):
        (folder / MODEL_FILE).write_bytes(content)
        with pytest.raises(ExportError):
            OnnxModel(folder)
    monkeypatch.setattr(trust, "MAX_GRAPH_BYTES", 1000)
    (folder / MODEL_FILE).write_bytes(bytes(1001))
    refused(folder, [], "larger than 1000")


def test_deeply_nested_graphs_raise(folder, sessions):
    """Too deep for protobuf, so written by hand: the field `graph`, then `node`, `attribute` and `g` repeatedly."""
    content = inner(external("/etc/passwd")).SerializeToString()
    for field in [6, 5, 1] * 100 + [7]:
        length, size = b"", len(content)
        while size > 127:
            length, size = length + bytes([size & 127 | 128]), size >> 7
        content = bytes([field << 3 | 2]) + length + bytes([size]) + content
    (folder / MODEL_FILE).write_bytes(content)
    refused(folder, sessions, "cannot be read")


def test_symbolic_links_may_lead_only_to_the_hub_cache(folder, tmp_path, sessions):
    linked = tmp_path / "snapshots" / "main"
    shutil.copytree(folder, tmp_path / "blobs")
    linked.mkdir(parents=True)
    for file in folder.iterdir():
        (linked / file.name).symlink_to(f"../../blobs/{file.name}")
    OnnxModel(linked)
    sessions.clear()
    (folder / DATA_FILE).rename(tmp_path / "private")
    (folder / DATA_FILE).symlink_to("../private")
    refused(folder, sessions, "a link to a file elsewhere")


# Manifests


def change(folder, path, value, file=MANIFEST_FILE):
    content = json.loads((folder / file).read_text())
    *places, last = path.split(".")
    part = content
    for place in places:
        part = part[int(place) if isinstance(part, list) else place]
    part[last] = value
    (folder / file).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("interface.packed", 1, "packed"),
        ("interface.vocab_size", 2**40, "vocab_size"),
        ("interface.max_length", 2**40, "max_length"),
        ("interface.max_length", False, "max_length"),
        ("interface.positions", -1, "positions"),
        ("interface.segment", 2**30, "segment"),
        ("interface.layers", [{"key": None, "value": None, "state": None}] * 10_001, "layers"),
        ("interface.layers.0.key", [2, 2**40], "layers.key"),
        ("interface.layers.0.state", [1, MAX_RANK + 1, MAX_RANK + 1], "layers.state"),
        ("interface.layers.0.state", [10**6, 4, 4], "layers.state"),
        ("interface.layers.0.state", [2, 3, 3], "is inconsistent"),
        ("interface.segment", 0, "is inconsistent"),
        ("quantization", {"bits": 4, "group_size": 32}, "symmetric"),
        ("quantization", {"bits": 4, "group_size": 0, "symmetric": True}, "quantization.group_size"),
        ("quantization", {"bits": True, "group_size": 32, "symmetric": True}, "quantization.bits"),
        ("quantization", {"bits": 4, "group_size": 32, "symmetric": 1}, "quantization.symmetric"),
        ("quantization", 4, "quantization"),
        ("max_abs_diff", float("nan"), "NaN"),
        ("format_version", 3.0, "has format 3.0"),
        ("format_version", True, "has format True"),
    ],
)
def test_invalid_manifests_raise(folder, sessions, path, value, says):
    change(folder, path, value)
    refused(folder, sessions, says)


def test_a_manifest_of_an_older_version_may_lack_groups(qwen3):
    content = json.loads(qwen3.manifest.to_json())
    del content["quantization"]
    assert Manifest.from_json(json.dumps({**content, "quantize": "int4"})).quantization is None


@pytest.mark.parametrize(
    ("version", "packages", "next"),
    [
        (5, {"deltamem-tool": "99.2"}, "Update deltamem-tool: pip install -U 'deltamem-tool>=99.2'"),
        (5, {"deltamem-tool": "9'; evil"}, "Update deltamem-tool: pip install -U deltamem-tool"),
        (5, [], "Update deltamem-tool: pip install -U deltamem-tool"),
        (2, {"deltamem-tool": "99.2"}, "Export the adapter again."),
        (1, None, "Export the adapter again."),
        ("5", None, "Export the adapter again."),
    ],
)
def test_other_format_versions_say_what_to_install(folder, sessions, version, packages, next):
    change(folder, "format_version", version)
    change(folder, "packages", packages)
    with pytest.raises(ExportError, match=f"has format {version}") as refusal:
        OnnxModel(folder)
    assert refusal.value.next == next and sessions == []


@pytest.mark.parametrize(
    ("file", "content"),
    [
        (MANIFEST_FILE, "[" * 100_000),
        (MANIFEST_FILE, b"\xff"),
        ("generation_config.json", '{"eos_token_id": [[1]]}'),
        ("generation_config.json", '{"eos_token_id": "1"}'),
        ("generation_config.json", "{" * 9),
        ("tokenizer_config.json", '{"a":' * 70 + "1" + "}" * 70),
        ("tokenizer.json", "[" * 100_000),
        ("chat_template.jinja", b"\xff"),
        ("chat_template.jinja", "{{" * 300),
    ],
)
def test_other_invalid_files_raise(folder, sessions, file, content):
    (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(folder, sessions)


def test_odd_entries_of_a_tokenizer_config_are_ignored(folder):
    (folder / "chat_template.jinja").unlink()
    for template in (5, [5], [{"name": "default"}], {"default": []}, None):
        content = {"chat_template": template, "eos_token": {"no": "content"}, "bos_token": {"content": 5}}
        (folder / "tokenizer_config.json").write_text(json.dumps(content))
        assert not OnnxModel(folder).text.has_template


# Any byte


def mutated(content, chance):
    result = bytearray(content)
    for _ in range(chance.choice((1, 2, 5))):
        at = chance.randrange(len(result))
        kind = chance.randrange(3)
        if kind == 0:
            result[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            del result[at : at + chance.randrange(1, 9)]
        else:
            result[at:at] = chance.randbytes(chance.randrange(1, 9))
    return bytes(result)


@pytest.mark.parametrize("name", [MODEL_FILE, MANIFEST_FILE])
def test_mutated_graphs_raise_or_are_harmless(folder, name):
    """A graph that passes has its weights in the expected file, and known operators."""
    content = (folder / name).read_bytes()
    chance, outcomes = random.Random(0), {True: 0, False: 0}
    for _ in range(MUTATIONS):
        (folder / name).write_bytes(mutated(content, chance))
        try:
            if name == MODEL_FILE:
                check_graph_file(folder)
                assert {entry.value for entry in _locations(folder)} <= {DATA_FILE}
            else:
                assert Manifest.read(folder).interface.layers
            outcomes[True] += 1
        except DeltaMemError:
            outcomes[False] += 1
    assert all(outcomes.values())


def _locations(folder: Path):
    return [
        entry
        for tensor in graph_of(folder).graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    ]

"""docs/formats.md describes exactly the fields that are written; docs/design.md lists every room, in order."""

from __future__ import annotations

import dataclasses
import json
import re
import tomllib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from evaluation.reported import evaluation_of

from deltamem_tool.adapter import config_file
from deltamem_tool.adapter.save import contents_of
from deltamem_tool.bench import result as bench
from deltamem_tool.config import BRANCHES, DeltaMemConfig
from deltamem_tool.evaluation.conditions import ONNX
from deltamem_tool.evaluation.records import Record
from deltamem_tool.evaluation.report import compare, evaluation_file
from deltamem_tool.evaluation.run_info import run_json
from deltamem_tool.io.tensor_header import header_of
from deltamem_tool.memory import file as memory_file
from deltamem_tool.memory.adapter import DeltaMemAdapter
from deltamem_tool.memory.weights import weight_shapes
from deltamem_tool.onnx import manifest as onnx
from deltamem_tool.onnx.contract import Interface, Layer
from deltamem_tool.training.summary import TrainingSummary

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")


def described(table: str) -> set[str]:
    """The names in the first column of a table."""
    match = re.search(rf"<!-- fields: {table} -->\n(.*?)<!-- /fields -->", TEXT, re.DOTALL)
    assert match is not None, table
    rows = [line for line in match[1].splitlines()[2:] if line.startswith("|")]
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row.split("|")[1])}


def names(cls: type) -> set[str]:
    return {field.name for field in dataclasses.fields(cls)}


def adapter_config() -> set[str]:
    base = config_file.BaseModel("base", None, "qwen3", "0" * 64)
    files = contents_of(DeltaMemAdapter(DeltaMemConfig(), []), base, {"alpha": 16})
    return set(json.loads(files[config_file.CONFIG_FILE]))


def weights() -> set[str]:
    """The weights of an adapter with all optional weights."""
    return set(weight_shapes(DeltaMemConfig(branches=BRANCHES, couple_lambda=False, delta_scale="layer", o_norm=True)))


def memory() -> set[str]:
    stored = memory_file.StoredMemory({0: np.zeros((1, 1, 8, 8), np.float32)}, {}, "0" * 64)
    return set(header_of(memory_file.memory_bytes(stored)).metadata)


def run() -> dict[str, object]:
    layers = (Layer((1, 8), (1, 8), (1, 8, 8)),)
    manifest = onnx.Manifest(
        "0" * 64, {}, "base", "qwen3", "cpu", "none", None, Interface("last", 9, "float32", 0, layers), 0.0, None, {}
    )
    model = SimpleNamespace(manifest=manifest, graph=SimpleNamespace(device="cpu"))
    return run_json(model, dataclasses.replace(evaluation_of(), runtime=ONNX), ["deltamem"], {}, 1.0)


def evaluation() -> set[str]:
    return set(evaluation_file.evaluation_json(dataclasses.replace(evaluation_of(), margin=0.1), "0" * 64, [], run()))


@pytest.mark.parametrize(
    ("table", "written"),
    [
        ("adapter", adapter_config),
        ("base", lambda: names(config_file.BaseModel)),
        ("mechanism", lambda: set(DeltaMemConfig().to_dict())),
        ("weights", weights),
        ("training", lambda: names(TrainingSummary)),
        ("memory", memory),
        ("manifest", lambda: {"format", "format_version", *names(onnx.Manifest)}),
        ("quantization", lambda: names(onnx.Quantization)),
        ("interface", lambda: names(Interface)),
        ("layer", lambda: names(Layer)),
        ("evaluation", evaluation),
        ("run", lambda: set(run())),
        ("record", lambda: names(Record)),
    ],
)
def test_exactly_the_written_fields_are_described(table, written):
    assert described(table) == written()


def test_the_versions_match_the_code():
    rows = re.findall(r"^\| .* \| `(deltamem-[a-z-]+)` \| (\d+) \| ([\d, ]*)\|", TEXT, re.MULTILINE)
    versions = {name: (written, read.strip()) for name, written, read in rows}
    readable = ", ".join(map(str, onnx.READABLE_VERSIONS))

    def both(version: int) -> tuple[str, str]:
        return str(version), str(version)

    assert versions == {
        config_file.FORMAT: both(config_file.FORMAT_VERSION),
        config_file.STATIC_FORMAT: both(config_file.FORMAT_VERSION),
        memory_file.FORMAT: both(memory_file.FORMAT_VERSION),
        onnx.FORMAT: (str(onnx.FORMAT_VERSION), readable),
        evaluation_file.FORMAT: both(evaluation_file.FORMAT_VERSION),
        compare.FORMAT: (str(compare.FORMAT_VERSION), ""),
        bench.FORMAT: (str(bench.FORMAT_VERSION), ""),
    }


def test_the_map_lists_every_room_in_the_order_of_imports():
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]
    layers = [
        {room.strip().removeprefix("deltamem_tool.") for room in layer.split(":")}
        for layer in reversed(contract["layers"])
    ]
    page = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    table = page.partition("| room | |")[2].partition("\n\n")[0].splitlines()[2:]
    mapped = [room for row in table for room in re.findall(r"`([^`]+)`", row.split("|")[1])]
    assert set(mapped) == set().union(*layers)
    level = {room: number for number, layer in enumerate(layers) for room in layer}
    assert [level[room] for room in mapped] == sorted(level[room] for room in mapped)

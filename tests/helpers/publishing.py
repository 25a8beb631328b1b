"""Folders that can be pushed, created without training and without tracing a graph."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import onnx.helper

from deltamem_tool.adapter.config_file import CONFIG_FILE, PLOT_FILE, SUMMARY_FILE
from deltamem_tool.adapter.folder import read_adapter
from deltamem_tool.evaluation.report.evaluation_file import EVALUATION_FILE, FORMAT
from deltamem_tool.io.names import ASSETS
from deltamem_tool.onnx import contract
from deltamem_tool.onnx.contract import Interface, Layer
from deltamem_tool.onnx.manifest import Manifest

BASE = "someone/base"
COMMIT = "5" * 40
CONDITIONS = {"state": "the memory", "zero_state": "zeros", "donor_state": "another's"}


def adapter_folder(folder: Path, name: str = BASE, revision: str | None = COMMIT) -> Path:
    """The shipped adapter, with `name` as its base."""
    shutil.copytree(ASSETS / "adapter", folder)
    config = folder / CONFIG_FILE
    content = json.loads(config.read_text())
    content["base"] |= {"name": name, "revision": revision}
    config.write_text(json.dumps(content))
    return folder


def trained(folder: Path, data: str | None = "talks.jsonl") -> Path:
    """Adds the files that training writes."""
    recipe = {"data.path": data, "training.learning_rate": 1e-3, "training.seed": 7}
    summary = {"recipe": recipe, "steps": 40, "versions": {"torch": "2.13"}}
    (folder / SUMMARY_FILE).write_text(json.dumps(summary))
    (folder / PLOT_FILE).write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(64))
    return folder


def evaluated(folder: Path, adapter: str | None = None) -> Path:
    """Adds an evaluation of this adapter, or of the one with the fingerprint `adapter`."""
    scores = {name: [[1.0 - at / 10, 0.9 - at / 10, 1.0], [0.5, 0.4, 0.6]] for at, name in enumerate(CONDITIONS)}
    evaluation = {
        "format": FORMAT,
        "format_version": 1,
        "task": "recall",
        "protocol": "memory",
        "metric": "exact",
        "arguments": ["--task", "recall", "--set", "facts=[1,4]"],
        "adapter": adapter or read_adapter(folder).fingerprint,
        "groups": ["1 fact", "4 facts"],
        "questions": [200, 150],
        "scores": scores,
        "overall": {name: rows[0] for name, rows in scores.items()},
        "conditions": CONDITIONS,
        "verdict": ["the state adds 0.20 ± 0.04 over donor state"],
        "seed": 3,
    }
    (folder / EVALUATION_FILE).write_text(json.dumps(evaluation))
    return folder


def onnx_folder(folder: Path, adapter: str | None = None, base_model: str | None = BASE) -> Path:
    """A complete folder with a valid manifest. Its graph is empty, so it cannot run."""
    found = read_adapter(ASSETS / "adapter")
    layers = (Layer((1, 8), (1, 8), found.config.state_shape),) * len(found.layer_indices)
    manifest = Manifest(
        adapter=adapter or found.fingerprint,
        mechanism=found.config.to_dict(),
        base_model=base_model,
        model_type="qwen3",
        target="cpu",
        quantize="none",
        quantization=None,
        interface=Interface("last", 767, contract.FLOAT32, 0, layers),
        max_abs_diff=1e-5,
        greedy_agreement=None,
        packages={},
    )
    folder.mkdir(parents=True)
    for name in contract.REQUIRED_FILES:
        (folder / name).write_bytes(b"{}")
    graph = onnx.helper.make_graph([], "empty", [], [])
    onnx.save(onnx.helper.make_model(graph), folder / contract.MODEL_FILE)
    (folder / contract.DATA_FILE).write_bytes(bytes(range(256)) * 40)
    (folder / contract.MANIFEST_FILE).write_text(manifest.to_json())
    return folder


def other_adapter(folder: Path, **changes) -> Path:
    """An adapter with the same weights and another option, and so another fingerprint."""
    adapter_folder(folder)
    adapter = read_adapter(folder)
    config = folder / CONFIG_FILE
    content = json.loads(config.read_text())
    content["mechanism"] = replace(adapter.config, alpha=8.0, **changes).to_dict()
    config.write_text(json.dumps(content))
    return folder

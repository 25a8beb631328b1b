"""Modules that do not need torch, transformers or ONNX Runtime do not import them: these may be missing or slow."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
from helpers.shared_folder import folder_once

HEAVY = {"torch", "transformers", "onnxruntime", "onnx", "onnxscript", "matplotlib", "huggingface_hub"}

# Imports, and the libraries that they must not load. import-linter checks the order of the rooms (pyproject.toml).
CASES = [
    ("deltamem_tool", HEAVY),
    ("deltamem_tool.errors, deltamem_tool.config, deltamem_tool.io.atomic, deltamem_tool.data.dialogues", HEAVY),
    ("deltamem_tool.recipe.load", HEAVY),
    ("deltamem_tool.base_model.launch", HEAVY),
    ("deltamem_tool.base_model.limits", HEAVY),
    ("deltamem_tool.base_model.support", HEAVY),
    ("deltamem_tool.io.names", HEAVY),
    ("deltamem_tool.adapter.config_file", HEAVY),
    ("deltamem_tool.memory.file", HEAVY),
    ("deltamem_tool.memory.shared_file", HEAVY),
    ("deltamem_tool.memory.plot", HEAVY - {"matplotlib"}),
    ("deltamem_tool.ops.numpy_write", HEAVY),
    ("deltamem_tool.ops.scan", HEAVY - {"torch"}),
    ("deltamem_tool.adapter.folder", HEAVY),
    ("deltamem_tool.memory.layer", {"transformers", "onnxruntime"}),
    ("deltamem_tool.memory.state", {"transformers", "onnxruntime", "matplotlib"}),
    ("deltamem_tool.data.store, deltamem_tool.data.collate", {"onnxruntime", "onnx", "matplotlib"}),
    ("deltamem_tool.segments.boundaries", HEAVY),
    ("deltamem_tool.chat.conversation", HEAVY),
    ("deltamem_tool.chat.repl, deltamem_tool.memory.heatmap", HEAVY),
    ("deltamem_tool.chat.torch_engine", {"onnxruntime", "onnx", "onnxscript", "matplotlib"}),
    ("deltamem_tool.evaluation", HEAVY),
    ("deltamem_tool.hub.push, deltamem_tool.hub.pull", (HEAVY | {"peft"}) - {"huggingface_hub"}),
    ("deltamem_tool.onnx.contract", HEAVY),
    ("deltamem_tool.quickstart.bases", HEAVY),
    ("deltamem_tool.serve.store", HEAVY),
    ("deltamem_tool.onnx.runtime.engine", {"torch", "transformers"}),
    ("deltamem_tool.serve.app, deltamem_tool.serve.server", HEAVY),
    ("deltamem_tool.serve.batching.scheduler", HEAVY),
]
LIBRARIES = ("torch", "transformers.modeling_utils")  # imports that take seconds
# Each import runs in a fork of a process that has already loaded the libraries that the import may load.
FORKS = """
import importlib, json, os, sys

for library, modules in json.loads(sys.argv[1]):
    if library:
        importlib.import_module(library)
    for module in modules:
        child = os.fork()
        if not child:
            exec(f"import {module}")
            print(json.dumps([module, list(sys.modules)]), flush=True)
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            sys.exit(f"import {module}")
"""


def stage(without: set[str]) -> int:
    """The number of `LIBRARIES` that may be imported before the module."""
    forbidden = [library.partition(".")[0] in without for library in LIBRARIES]
    return (*forbidden, True).index(True)


@pytest.fixture(scope="module")
def imported_modules(tmp_path_factory) -> dict[str, set[str]]:
    """The modules that each import loads, measured once for all of pytest-xdist's workers."""
    stages = [[module for module, without in CASES if stage(without) == n] for n in range(len(LIBRARIES) + 1)]

    def make(folder):
        plan = json.dumps(list(zip(("", *LIBRARIES), stages, strict=True)))
        command = [sys.executable, "-c", FORKS, plan]
        result = subprocess.run(command, capture_output=True, text=True, timeout=240)
        assert result.returncode == 0, result.stderr
        (folder / "modules").write_text(result.stdout)

    lines = (folder_once(tmp_path_factory, "imports", make) / "modules").read_text().splitlines()
    return {module: set(modules) for module, modules in map(json.loads, lines)}


@pytest.mark.slow
@pytest.mark.parametrize(("module", "without"), CASES)
def test_a_room_does_not_import_heavy_libraries(imported_modules, module, without):
    assert not without & imported_modules[module]


@pytest.mark.slow
def test_an_unknown_task_is_reported_before_transformers_is_imported():
    """PyTorch is imported, to check that it can be."""
    words = ["-X", "importtime", "-m", "deltamem_tool", "eval", "builtin:adapter", "--task", "nothing"]
    result = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=240)
    assert "There is no task 'nothing'" in result.stderr and result.returncode == 1
    assert not re.search(r"\| +(transformers|peft|accelerate)$", result.stderr, re.MULTILINE)

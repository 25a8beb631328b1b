"""The public names, and the one direction of imports between the rooms."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from once import folder_once

import deltamem_tool

PUBLIC = {
    "DeltaMemConfig",
    "DeltaMemError",
    "MemoryCache",
    "MemoryState",
    "__version__",
    "attach",
    "convert",
    "detach",
    "encode_chat",
    "load",
    "save_adapter",
}
HEAVY = {"torch", "transformers", "onnxruntime", "onnx", "onnxscript", "matplotlib", "huggingface_hub"}
READING = {"bounded", "errors", "versions"}  # what files of strangers are read with
RECIPE = {"config", "dialogues", "errors", "recipe", "recipe_options", "recipe_words", "yaml_lines"}


def test_the_public_names_are_these():
    assert set(deltamem_tool.__all__) == PUBLIC and len(deltamem_tool.__all__) == len(PUBLIC)
    assert set(dir(deltamem_tool)) == PUBLIC
    for name in PUBLIC:
        assert getattr(deltamem_tool, name) is not None
    for name in PUBLIC - {"__version__"}:
        assert getattr(deltamem_tool, name).__doc__, f"{name} has no documentation"
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        deltamem_tool.nothing  # noqa: B018


# Imports, what must not come with them, and which rooms of ours exactly.
CASES = [
    ("deltamem_tool", HEAVY, set()),
    ("deltamem_tool.errors, deltamem_tool.config, deltamem_tool.files, deltamem_tool.dialogues", HEAVY, None),
    ("deltamem_tool.recipe", HEAVY, RECIPE),
    ("deltamem_tool.support", HEAVY, {"errors", "support"}),
    ("deltamem_tool.resolve", HEAVY, {"errors", "resolve"}),
    ("deltamem_tool.adapter_config", HEAVY, {"adapter_config", *READING, "config"}),
    ("deltamem_tool.memory_file", HEAVY, {"files", "memory_file", "tensor_header", *READING}),
    ("deltamem_tool.memory_picture", HEAVY - {"matplotlib"}, {"errors", "files", "memory_picture"}),
    ("deltamem_tool.ops", HEAVY - {"torch"}, {"_compat", "errors", "ops"}),
    (
        "deltamem_tool.adapter_folder",
        HEAVY - {"torch"},
        {
            "_compat",
            "adapter_config",
            "adapter_folder",
            "config",
            "fake",
            "memory",
            "ops",
            "resolve",
            "tensor_header",
            *READING,
        },
    ),
    ("deltamem_tool.memory", {"transformers", "onnxruntime"}, {"_compat", "config", "errors", "fake", "memory", "ops"}),
    (
        "deltamem_tool.state",
        {"onnxruntime", "matplotlib"},
        {
            "_compat",
            "config",
            "fake",
            "files",
            "memory",
            "memory_file",
            "ops",
            "patched",
            "state",
            "tensor_header",
            *READING,
        },
    ),
    (
        "deltamem_tool.data",
        {"onnxruntime", "onnx", "matplotlib"},
        set("_compat chat_template config data dialogues errors fake files marks memory ops segments".split()),
    ),
    ("deltamem_tool.marks", HEAVY, {"chat_template", "config", "errors", "marks"}),
    ("deltamem_tool.chat.conversation", HEAVY, None),
    ("deltamem_tool.chat.session, deltamem_tool.memory_text", HEAVY, None),
    ("deltamem_tool.chat.torch_runtime", {"onnxruntime", "onnx", "onnxscript", "matplotlib"}, None),
    ("deltamem_tool.evaluation", HEAVY, {"evaluation"}),
    ("deltamem_tool.hub.push", (HEAVY | {"peft"}) - {"torch", "huggingface_hub"}, None),
    ("deltamem_tool.onnx.contract", HEAVY, {"config", "onnx", *READING}),
    ("deltamem_tool.onnx.runtime", {"torch", "transformers"}, None),
]
LIBRARIES = ("torch", "transformers.modeling_utils")  # what takes seconds
# Each import is a fork's, of a process that has the libraries by then which the import may bring.
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
    """How many of `LIBRARIES` may be there before."""
    forbidden = [library.partition(".")[0] in without for library in LIBRARIES]
    return (*forbidden, True).index(True)


@pytest.fixture(scope="module")
def imported(tmp_path_factory) -> dict[str, set[str]]:
    """What is imported after each import, for all of pytest-xdist's workers."""
    stages = [[module for module, without, _ in CASES if stage(without) == n] for n in range(len(LIBRARIES) + 1)]

    def make(folder):
        plan = json.dumps(list(zip(("", *LIBRARIES), stages, strict=True)))
        command = [sys.executable, "-c", FORKS, plan]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        (folder / "modules").write_text(done.stdout)

    lines = (folder_once(tmp_path_factory, "imports", make) / "modules").read_text().splitlines()
    return {module: set(modules) for module, modules in map(json.loads, lines)}


@pytest.mark.parametrize(("module", "without", "own"), CASES)
def test_a_room_imports_what_is_left_of_it(imported, module, without, own):
    modules = imported[module]
    assert not without & modules
    if own is not None:
        rooms = {name.split(".")[1] for name in modules if name.startswith("deltamem_tool.")}
        assert rooms == own

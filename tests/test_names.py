"""The public names, and the one direction of imports between the rooms."""

from __future__ import annotations

import subprocess
import sys

import pytest

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


def imported_by(module: str) -> set[str]:
    code = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("module", "without", "own"),
    [
        ("deltamem_tool", HEAVY, set()),
        ("deltamem_tool.errors, deltamem_tool.config, deltamem_tool.files, deltamem_tool.dialogues", HEAVY, None),
        ("deltamem_tool.recipe", HEAVY, RECIPE),
        ("deltamem_tool.support", HEAVY, {"errors", "support"}),
        ("deltamem_tool.resolve", HEAVY, {"errors", "resolve"}),
        ("deltamem_tool.adapter_config", HEAVY, {"adapter_config", *READING, "config"}),
        ("deltamem_tool.memory_file", HEAVY, {"files", "memory_file", "tensor_header", *READING}),
        ("deltamem_tool.memory_picture", HEAVY - {"matplotlib"}, {"errors", "files", "memory_picture"}),
        ("deltamem_tool.ops", HEAVY - {"torch"}, {"errors", "ops"}),
        ("deltamem_tool.memory", {"transformers", "onnxruntime"}, {"config", "errors", "fake", "memory", "ops"}),
        (
            "deltamem_tool.state",
            {"onnxruntime", "matplotlib"},
            {"config", "fake", "files", "memory", "memory_file", "ops", "patched", "state", "tensor_header", *READING},
        ),
        (
            "deltamem_tool.data",
            {"onnxruntime", "onnx", "matplotlib"},
            set("chat_template config data dialogues errors fake files marks memory ops segments".split()),
        ),
        ("deltamem_tool.marks", HEAVY, {"chat_template", "config", "errors", "marks"}),
        ("deltamem_tool.chat.conversation", HEAVY, None),
        ("deltamem_tool.chat.session, deltamem_tool.memory_text", HEAVY, None),
        ("deltamem_tool.chat.torch_runtime", {"onnxruntime", "onnx", "onnxscript", "matplotlib"}, None),
        ("deltamem_tool.evaluation", HEAVY, {"evaluation"}),
        ("deltamem_tool.hub.push", {"onnxruntime", "onnx", "onnxscript", "matplotlib", "peft"}, None),
        ("deltamem_tool.onnx.contract", HEAVY, {"config", "onnx", *READING}),
        ("deltamem_tool.onnx.runtime", {"torch", "transformers"}, None),
    ],
)
def test_a_room_imports_what_is_left_of_it(module, without, own):
    modules = imported_by(module)
    assert not without & modules
    if own is not None:
        rooms = {name.split(".")[1] for name in modules if name.startswith("deltamem_tool.")}
        assert rooms == own

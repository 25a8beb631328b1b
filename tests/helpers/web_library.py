"""The JavaScript library of `web/` in Node, for tests."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.node import node_folder
from helpers.shared_folder import folder_once

SCRIPTS = Path(__file__).parents[1] / "onnx" / "web"
LIBRARY = Path(__file__).parents[2] / "web"


def library_folder(out: Path) -> Path:
    """The tests' scripts and the library, in a folder in which both find their packages."""
    scripts = node_folder(SCRIPTS, out)
    shutil.copytree(LIBRARY / "src", scripts / "src")
    return scripts


def in_node(scripts: Path, script: str, *arguments: str | Path, input: Any = None) -> Any:
    """Runs the script with `input` as JSON on stdin, and returns its JSON output."""
    command = ["node", script, *arguments]
    result = subprocess.run(command, cwd=scripts, input=json.dumps(input), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def talk(scripts: Path, folder: Path, actions: list[dict[str, Any]], **options: Any) -> list[dict[str, Any]]:
    """A result for each action; `logits` float32 `[calls, V]` and `memory` bytes."""
    results = in_node(scripts, "talk.mjs", folder, input={"options": options, "actions": actions})
    for result in results:
        if "logits" in result:
            result["logits"] = np.frombuffer(base64.b64decode(result["logits"]), np.float32)
            result["memory"] = base64.b64decode(result["memory"])
    return results


def shipped_for_web(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped adapter as a folder for browsers; read only."""

    def export(out: Path) -> None:
        import deltamem_tool as deltamem
        from deltamem_tool.base_model.tokenizer import tokenizer_of

        model = deltamem.load("builtin:adapter")
        deltamem.export_onnx(model, tokenizer_of(model, for_chat=False), out / "exported", target="web")

    return folder_once(tmp_path_factory, "shipped_for_web", export) / "exported"


def text_of(content: bytes) -> str:
    """Bytes as text for JSON."""
    return base64.b64encode(content).decode()


def in_javascript(options: dict[str, Any]) -> dict[str, Any]:
    """Sampling options by their names in JavaScript."""

    def camel(name: str) -> str:
        first, *others = name.split("_")
        return first + "".join(word.capitalize() for word in others)

    return {camel(name): value for name, value in options.items()}

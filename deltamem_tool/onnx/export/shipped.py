"""Export the adapters shipped with the package as ONNX folders, once, into the user's cache."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import platformdirs

from deltamem_tool._version import __version__
from deltamem_tool.adapter.config_file import CONFIG_FILE
from deltamem_tool.io.atomic import locked
from deltamem_tool.io.names import ASSETS, BUILTIN

_KEY = 16  # hexadecimal digits


def is_shipped(name: str) -> bool:
    """Whether `name` is `builtin:NAME` of an adapter that the package ships."""
    return name.startswith(BUILTIN) and (ASSETS / name.removeprefix(BUILTIN) / CONFIG_FILE).is_file()


def shipped_folder(name: str) -> Path:
    """Where the ONNX folder of `builtin:NAME` is, or will be: another place for every version of it and the package."""
    content = hashlib.sha256(__version__.encode())
    for file in sorted((ASSETS / name.removeprefix(BUILTIN)).iterdir()):
        content.update(file.read_bytes())
    cache = platformdirs.user_cache_path("deltamem", appauthor=False) / "onnx"
    return cache / f"{name.removeprefix(BUILTIN)}-{content.hexdigest()[:_KEY]}"


def export_shipped(name: str, progress: Callable[[str, int, int], object]) -> None:
    """Export `builtin:NAME` to its folder, whole or not at all, unless it is there.

    Args:
        name: of an adapter that the package ships.
        progress: as in `export_onnx`.

    Raises:
        DeltaMemError: its base model cannot be fetched, or the export fails; there is no folder then.
    """
    from deltamem_tool.adapter.load import load
    from deltamem_tool.base_model.tokenizer import tokenizer_of
    from deltamem_tool.onnx.export.export import export_onnx

    folder = shipped_folder(name)
    with locked(folder):  # whoever waited for another program to export it finds it
        if not folder.is_dir():
            for part in folder.parent.glob(f".{folder.name}.*"):  # of a program that was killed
                shutil.rmtree(part, ignore_errors=True)
            progress("Loading the model", 0, 0)
            model = load(name)
            export_onnx(model, tokenizer_of(model, for_chat=False), folder, progress=progress)

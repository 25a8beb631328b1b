"""Export the adapters shipped with the package as ONNX folders, once, into the user's cache."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import platformdirs

from deltamem_tool._version import __version__
from deltamem_tool.adapter.config_file import CONFIG_FILE
from deltamem_tool.io.atomic import file_lock
from deltamem_tool.io.names import ASSETS, BUILTIN

_KEY = 16  # hexadecimal digits


def is_shipped(name: str) -> bool:
    """Return whether `name` is the `builtin:NAME` of an adapter shipped with the package."""
    return name.startswith(BUILTIN) and (ASSETS / name.removeprefix(BUILTIN) / CONFIG_FILE).is_file()


def shipped_folder(name: str) -> Path:
    """Return the path of the ONNX folder of `builtin:NAME`. It differs for each version of adapter and package."""
    content = hashlib.sha256(__version__.encode())
    for file in sorted((ASSETS / name.removeprefix(BUILTIN)).iterdir()):
        content.update(file.read_bytes())
    cache = platformdirs.user_cache_path("deltamem", appauthor=False) / "onnx"
    return cache / f"{name.removeprefix(BUILTIN)}-{content.hexdigest()[:_KEY]}"


def export_shipped(name: str, progress: Callable[[str, int, int], object]) -> None:
    """Export `builtin:NAME` to its folder, completely or not at all, unless the folder exists.

    Args:
        name: name of an adapter shipped with the package.
        progress: as in `export_onnx`.

    Raises:
        DeltaMemError: the base model cannot be fetched, or the export fails. No folder is created.
    """
    from deltamem_tool.adapter.load import load
    from deltamem_tool.base_model.tokenizer import tokenizer_of
    from deltamem_tool.onnx.export.export import export_onnx

    folder = shipped_folder(name)
    with file_lock(folder):  # another program may have exported it while this one waited
        if not folder.is_dir():
            for part in folder.parent.glob(f".{folder.name}.*"):  # left by a program that was killed
                shutil.rmtree(part, ignore_errors=True)
            progress("Loading the model", 0, 0)
            model = load(name)
            export_onnx(model, tokenizer_of(model, for_chat=False), folder, progress=progress)

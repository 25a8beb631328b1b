"""Find an ONNX folder: a local folder, one beside an adapter, or one in a repository on the Hub."""

from __future__ import annotations

from pathlib import Path

from deltamem_tool.adapter.config_file import CONFIG_FILE
from deltamem_tool.io.names import expand_user, fetch, hub_name
from deltamem_tool.onnx.contract import FILES, MANIFEST_FILE, check_folder

ONNX_FOLDER = "onnx"  # subfolder of a repository that may also hold an adapter


def find_onnx(name: str | Path) -> Path:
    """Return the local path of an ONNX folder, or of the subfolder `onnx`; a Hub repository is fetched first.

    Raises:
        ExportError: a file is missing.
        HubError: there is no such folder or repository.
    """
    hub = hub_name(str(name))
    patterns = [*FILES, *(f"{ONNX_FOLDER}/{file}" for file in FILES)]
    folder = expand_user(name) if hub is None else fetch(hub, patterns, "ONNX folder")
    inside = folder / ONNX_FOLDER
    is_inside = not (folder / MANIFEST_FILE).is_file() and (inside / MANIFEST_FILE).is_file()
    return check_folder(inside if is_inside else folder)


def is_onnx(name: str | Path) -> bool:
    """Return whether a folder or repository is for ONNX Runtime: it has an ONNX folder and no adapter beside it."""
    hub = hub_name(str(name))
    manifests = [MANIFEST_FILE, f"{ONNX_FOLDER}/{MANIFEST_FILE}"]
    folder = expand_user(name) if hub is None else fetch(hub, [CONFIG_FILE, *manifests], "adapter or ONNX folder")
    return not (folder / CONFIG_FILE).is_file() and any((folder / file).is_file() for file in manifests)

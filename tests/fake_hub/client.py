"""The real client, with its own repository on the fake Hub."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fake_hub.server import HubServer
from huggingface_hub import CommitInfo, CommitOperation, CommitOperationAdd, CommitOperationDelete, HfApi

REPO = "someone/memory"
CARD = b"---\nlicense: apache-2.0\ntags:\n- memory\n---\n# Memory\n"
SMALL = {"README.md": CARD, "config.json": b'{"rank": 4}\n', "notes/empty.bin": b""}
WEIGHTS = bytes(range(256)) * 40
LARGE = {"adapter.safetensors": WEIGHTS, "onnx/model.onnx": WEIGHTS[::-1], "picture.png": b"\x89PNG\0\0" * 9}


def writer(hub: HubServer) -> HfApi:
    """The client of someone who may write; `REPO` is there, with nothing in it."""
    hub.add_repo(REPO, {})
    return HfApi(endpoint=hub.endpoint, token="hf_write")


def commit(
    api: HfApi, files: Mapping[str, bytes], deleted: Iterable[str] = (), message: str = "Change", **options: Any
) -> CommitInfo:
    """Commit to `REPO`."""
    operations: list[CommitOperation] = [CommitOperationAdd(path, content) for path, content in files.items()]
    operations += [CommitOperationDelete(path) for path in deleted]
    return api.create_commit(REPO, operations, commit_message=message, **options)


def read(folder: str | Path) -> dict[str, bytes]:
    """Every file below a folder."""
    files = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}

"""A folder for what took long to make, under a key of all that decides it: whole or absent, and checked when found."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
from filelock import FileLock

from deltamem_tool.data.encode import Encoder
from deltamem_tool.data.episode import Episode
from deltamem_tool.io.atomic import folder_whole

ENCODING_VERSION = 1  # goes up when `Encoder` gives other tokens for the same input, or what is stored changes
MANIFEST_FILE = "manifest.json"

_log = logging.getLogger(__name__)


def cache_key(episodes: Sequence[Episode], encoder: Encoder) -> str:
    """All that decides the encoding, as a sha256: the tokenizer, the template, the options, every episode."""
    tokenizer = encoder.tokenizer
    vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())
    for passing in ("truncation", "padding"):  # set by whoever called it last
        vocabulary.pop(passing, None)
    parts: list[Any] = [
        ENCODING_VERSION,
        encoder.options(),
        type(tokenizer).__name__,
        vocabulary,
        {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        getattr(tokenizer, "split_special_tokens", False),
        tokenizer.chat_template,
    ]
    digest = hashlib.sha256(json.dumps(parts).encode())
    for episode in episodes:  # keys in their order: a template may write them in it
        said = (episode.history, episode.exchanges, episode.where)
        digest.update(json.dumps(said, default=repr).encode() + b"\n")
    return digest.hexdigest()


def cached_folder(key: str, make: Callable[[Path], dict[str, Any]]) -> tuple[Path, dict[str, Any]]:
    """The folder of `key` in the cache directory of `datasets`, and what `make` returned when it filled it.

    One process makes it; others that want the same wait. A folder that is not as it was written is made again.
    """
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "deltamem" / key
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if folder.exists():
            said = _read_manifest(folder)
            if said is not None:
                return folder, said
            _log.warning("The cache %s is damaged and is made again.", folder)
        with folder_whole(folder, overwrite=True) as staged:
            said = make(staged)
            files = {file.name: _digest(file) for file in sorted(staged.iterdir())}
            (staged / MANIFEST_FILE).write_text(json.dumps({"files": files, "said": said}), encoding="utf-8")
    return folder, said


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    """What `make` said of a folder, if every file in it is as it was written."""
    try:
        manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
        if all(_digest(folder / name) == digest for name, digest in manifest["files"].items()):
            return manifest["said"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    return None


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()

"""Fetch an adapter, an ONNX folder, or both from the Hub, and check them."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from deltamem_tool._compat import git_hash, sha_fileobj
from deltamem_tool.errors import HubError
from deltamem_tool.hub.contents import CARD_FILE, REPO_FILES, Contents, read_contents
from deltamem_tool.io.atomic import check_overwrite, folder_whole
from deltamem_tool.io.names import commit_of, fetch, on_hub


@dataclass(frozen=True)
class Pulled:
    """What came."""

    path: Path  # `out`, or the folder in the Hub's cache
    commit: str | None
    contents: Contents


def pull(repo_id: str, revision: str | None = None, out: str | Path | None = None, overwrite: bool = False) -> Pulled:
    """Fetch what the repository holds of ours into the Hub's cache; nothing else of it comes, code least of all.

    Args:
        repo_id: `owner/name`, perhaps with `@revision`.
        revision: branch, tag or commit, if `repo_id` does not say it.
        out: a folder to copy it to, whole or not at all.
        overwrite: replace `out` if it is there.

    Raises:
        HubError: the Hub does not give it, or it holds nothing of ours.
        AdapterError, ExportError, DataError: a part is damaged; `out` was not written.
    """
    if out is not None:
        check_overwrite(out, overwrite)
    folder = fetch(on_hub(repo_id, revision), REPO_FILES, "repository")
    if not folder.is_dir():  # nothing of it was wanted
        raise HubError(f"{repo_id} holds no adapter and no ONNX folder.", "", "Check the name and the revision.")
    _refuse_damaged(folder, repo_id)
    contents = read_contents(folder)
    if out is None:
        return Pulled(folder, commit_of(folder), contents)
    with folder_whole(out, overwrite) as staged:
        card = {CARD_FILE: folder / CARD_FILE} if (folder / CARD_FILE).is_file() else {}
        for path, file in {**contents.files, **card}.items():
            assert isinstance(file, Path)  # nothing of it has been changed
            (staged / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, staged / path)
    return Pulled(Path(out), commit_of(folder), contents)


def _refuse_damaged(folder: Path, repo_id: str) -> None:
    """Raise if a file is not what the Hub has: its client looks at sizes alone. What is damaged leaves the cache."""
    for file in sorted(folder.rglob("*")):
        blob = file.resolve()  # in the cache: its name is the hash of its content, by SHA-256 if it is a large file
        if not file.is_symlink() or len(blob.name) not in (40, 64):
            continue
        with blob.open("rb") as content:
            found = sha_fileobj(content).hex() if len(blob.name) == 64 else git_hash(content.read())
        if found != blob.name:
            blob.unlink()
            file.unlink()
            raise HubError(
                f"{file.name} of {repo_id} is not what the Hub has.",
                "It was damaged on its way, or in the cache here; there it has been removed.",
                "Pull again.",
            )

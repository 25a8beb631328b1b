"""Fetch an adapter, an ONNX folder, or both from the Hub and check them."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from deltamem_tool._compat import git_hash, sha_fileobj
from deltamem_tool.errors import HubError
from deltamem_tool.hub.contents import CARD_FILE, REPO_FILES, Contents, read_contents
from deltamem_tool.io.atomic import atomic_folder, check_overwrite
from deltamem_tool.io.names import commit_of, expand_user, fetch, hub_uri


@dataclass(frozen=True)
class PullResult:
    """What was fetched.

    Args:
        path: `out`, or the folder in the Hub's cache.
        commit: of the repository.
        contents: the adapter, the ONNX folder, or both.
    """

    path: Path
    commit: str | None
    contents: Contents


def pull(
    repo_id: str, revision: str | None = None, out: str | Path | None = None, overwrite: bool = False
) -> PullResult:
    """Fetch the adapter and the ONNX folder of a repository from the Hub and check them.

    Only these files and the model card are fetched. They go to the Hub's cache.

    Args:
        repo_id: `owner/name`, optionally with `@revision`.
        revision: branch, tag or commit, if `repo_id` does not include it.
        out: folder to copy the files to, all of them or none.
        overwrite: replace `out` if it exists.

    Raises:
        HubError: the repository cannot be read, or contains neither an adapter nor an ONNX folder.
        AdapterError: the adapter is damaged; `out` was not written.
        ExportError: the ONNX folder is damaged; `out` was not written.
        DataError: the evaluation is damaged; `out` was not written.

    Example:
        >>> import deltamem_tool as deltamem
        >>> result = deltamem.pull("someone/my-adapter", out="pulled")
        >>> sorted(path.name for path in result.path.iterdir())
        ['README.md', 'deltamem.safetensors', 'deltamem_config.json']
    """
    if out is not None:
        out = expand_user(out)
        check_overwrite(out, overwrite)
    folder = fetch(hub_uri(repo_id, revision), REPO_FILES, "repository")
    if not folder.is_dir():  # no file was fetched
        raise HubError(f"{repo_id} contains no adapter and no ONNX folder.", "", "Check the name and the revision.")
    _check_files(folder, repo_id)
    contents = read_contents(folder)
    if out is None:
        return PullResult(folder, commit_of(folder), contents)
    with atomic_folder(out, overwrite) as staged:
        card = {CARD_FILE: folder / CARD_FILE} if (folder / CARD_FILE).is_file() else {}
        for path, file in {**contents.files, **card}.items():
            assert isinstance(file, Path)
            (staged / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, staged / path)
    return PullResult(out, commit_of(folder), contents)


def _check_files(folder: Path, repo_id: str) -> None:
    """Raise if a file does not have the Hub's hash; its client compares only sizes. Damaged files leave the cache."""
    for file in sorted(folder.rglob("*")):
        blob = file.resolve()  # named by its hash: SHA-256 of a large file, or else git's
        if not file.is_symlink() or len(blob.name) not in (40, 64):
            continue
        with blob.open("rb") as content:
            digest = sha_fileobj(content).hex() if len(blob.name) == 64 else git_hash(content.read())
        if digest != blob.name:
            blob.unlink()
            file.unlink()
            raise HubError(
                f"{file.name} of {repo_id} does not match the file on the Hub.",
                "It was damaged during the download or in the cache. It has been removed from the cache.",
                "Pull again.",
            )

"""Fetch an adapter, an ONNX folder, or both from the Hub, and check them."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from deltamem_tool.errors import HubError
from deltamem_tool.files import folder_whole, refuse_existing
from deltamem_tool.hub.contents import CARD_FILE, REPO_FILES, Contents, read_contents
from deltamem_tool.resolve import commit_of, fetch, hub_name


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
        refuse_existing(out, overwrite)
    hub = hub_name(repo_id if repo_id.startswith("hf://") else f"hf://{repo_id}", revision)
    assert hub is not None  # with hf:// it is a name on the Hub
    folder = fetch(hub, REPO_FILES, "repository")
    if not folder.is_dir():  # nothing of it was wanted
        raise HubError(f"{repo_id} holds no adapter and no ONNX folder.", "", "Check the name and the revision.")
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

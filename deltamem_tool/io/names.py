"""Resolve a name to a local folder, a repository on the Hub, or something shipped with the package.

path/to/folder, path/to/file.gguf
owner/name, owner/name@revision, owner/name@revision/folder, hf://owner/name/folder, owner/name:file.gguf
builtin:name
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from deltamem_tool.errors import ConfigError, HubError

if TYPE_CHECKING:
    from huggingface_hub import HfUri

BUILTIN = "builtin:"  # prefix of the names of shipped folders, and of a base model that the package fetches
BACKBONE = f"{BUILTIN}backbone"
ASSETS = Path(__file__).parents[1] / "assets"
_HUB = "hf://"
_GGUF = ".gguf"
_GGUF_ON_HUB = re.compile(rf"(?:{_HUB})?(?![.~])([^/:@\\]+/[^/:@\\]+(?:@[^:]+)?):([^:]+\.gguf)", re.IGNORECASE)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SNAPSHOTS = "snapshots"  # folder in the Hub's cache with a subfolder for each commit


def expand_user(path: str | Path) -> Path:
    """Replace a leading `~` by the home folder. A shell does not do so in --out=~/adapter, or in a file.

    Raises:
        ConfigError: the path is empty, `~USER` names an unknown user, or no file can have such a name.
    """
    if path == "":
        raise ConfigError("A path is empty.", "A shell variable may be unset.", "Write the path out.")
    try:
        if b"\0" in os.fsencode(path):
            raise ValueError("It contains a null character")
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{path} is not a valid path.", f"{error}", "Write the folder out.") from error
    except ValueError as error:  # half of a surrogate pair, too
        raise ConfigError(f"{path} is not a valid path.", f"{error}.", "Use another name.") from error


def expand_name(name: str | Path) -> str:
    """Do the same as `expand_user` for a name that may be a Hub id, which is returned unchanged."""
    return str(expand_user(name)) if str(name).startswith("~") or name == "" else str(name)


def is_gguf(name: str | Path) -> bool:
    """Return whether a path or a name on the Hub is that of a GGUF file."""
    return str(name).lower().endswith(_GGUF)


def hub_name(name: str, revision: str | None = None) -> HfUri | None:
    """Parse a Hub id, with `revision` if `name` contains none; None if `name` is a local path or a `builtin:` name.

    The `path_in_repo` of `OWNER/NAME:FILE.gguf` is the file.

    Raises:
        HubError: `name` is an invalid Hub id, or names another revision than `revision`.
    """
    gguf = _GGUF_ON_HUB.fullmatch(name)
    if gguf and not Path(name).exists():
        name = f"{_HUB}{gguf[1]}/{gguf[2]}"
    if not name.startswith(_HUB):
        # Without hf:// or a revision, a folder in a repository could be a mistyped local path.
        is_path = name.startswith((".", "/", "~")) or "\\" in name or name.partition("@")[0].count("/") != 1
        is_path = is_path or is_gguf(name)
        if is_path or name.startswith(BUILTIN) or Path(name).exists():
            return None
    from huggingface_hub import parse_hf_uri
    from huggingface_hub.errors import HfUriError

    try:
        uri = parse_hf_uri(name if name.startswith(_HUB) else _HUB + name)
        chosen = replace(uri, revision=uri.revision or revision, path_in_repo=uri.path_in_repo.strip("/"))
    except HfUriError as error:
        raise HubError(
            f"{name} is not a valid Hub id.",
            f"{error.msg.strip().rstrip('.')}.",
            "Write OWNER/NAME or OWNER/NAME@REVISION.",
        ) from error
    if uri.type != "model":
        raise HubError(
            f"{name} is a {uri.type} on the Hub.",
            "Only model repositories are supported.",
            "Pass the OWNER/NAME of a model.",
        )
    if revision is not None and uri.revision not in (None, revision):
        raise HubError(f"{name} names another revision than {revision}.", "Two revisions were given.", "Pass only one.")
    return chosen


def check_revision(name: str, revision: str | None) -> None:
    """Raise if `revision` is given for a name that cannot have one.

    Raises:
        HubError: `revision` is not None, and `name` is a local folder or a shipped one; or `name` is not a valid Hub
            id.
    """
    if revision is not None and hub_name(name) is None:
        raise HubError(
            f"{name} has no revision {revision}.", "It is not on the Hub.", "Leave the revision out, or pass a Hub id."
        )


def hub_uri(name: str, revision: str | None = None) -> HfUri:
    """Do the same as `hub_name` for a name that is on the Hub even if a local folder has the same name.

    Raises:
        HubError: `name` is not a valid Hub id.
    """
    uri = hub_name(name if name.startswith(_HUB) else _HUB + name, revision)
    assert uri is not None  # with hf:// it is a name on the Hub
    return uri


def hub_id(name: str) -> str:
    """Return `name` if it is `OWNER/NAME`.

    Raises:
        HubError: `name` is not a Hub id, or contains a revision or a path.
    """
    hub = hub_uri(name)
    if hub.revision is not None or hub.path_in_repo:
        raise HubError(f"{name} is not a repository name.", "It contains a revision or a path.", "Write OWNER/NAME.")
    return hub.id


def resolve_folder(name: str, revision: str | None, files: Sequence[str], kind: str) -> Path:
    """Return the local folder of a name. From the Hub, files that match `files` are fetched into the Hub's cache.

    Args:
        name: see the module.
        revision: branch, tag or commit on the Hub, if `name` does not contain it.
        files: patterns of the files that are needed.
        kind: what the folder should contain, such as "adapter"; for messages.

    Raises:
        HubError: there is no such folder or repository, or it cannot be fetched.
    """
    if name.startswith(BUILTIN):
        shipped = {f"{BUILTIN}{file.parent.name}": file.parent for file in sorted(ASSETS.glob("*/*config.json"))}
        if name not in shipped:
            raise HubError(
                f"The package does not ship {name}.", f"It ships {', '.join(shipped)}.", "Use one of these names."
            )
        return shipped[name]
    hub = hub_name(name, revision)
    if hub is not None:
        return fetch(hub, files, kind)
    folder = expand_user(name)
    if folder.is_dir():
        return folder
    raise HubError(
        f"There is no {kind} folder {name}.",
        "It is neither a local folder nor a Hub id.",
        f"Pass the path of the {kind} folder, or its Hub id.",
    )


def fetch(hub: HfUri, files: Sequence[str], kind: str) -> Path:
    """Do the same as `resolve_folder` for a parsed Hub id."""
    from huggingface_hub import snapshot_download

    from deltamem_tool.io.hub_errors import CLIENT_ERRORS, hub_error, system_error

    below = f"{hub.path_in_repo}/" if hub.path_in_repo else ""
    try:
        root = Path(snapshot_download(hub.id, revision=hub.revision, allow_patterns=[below + file for file in files]))
    except CLIENT_ERRORS as error:
        if local := system_error(error):  # a full disk, or no permission
            raise local from error
        message = f"{short_name(hub)} is not a local folder, and no {kind} could be fetched from the Hub."
        raise hub_error(error, hub.id, message) from error
    return root / below


def is_cached(hub: HfUri) -> bool:
    """Return whether the Hub's cache has the file that `hub` names, in its revision."""
    from huggingface_hub import try_to_load_from_cache

    file = hub.path_in_repo
    return bool(file) and isinstance(try_to_load_from_cache(hub.id, file, revision=hub.revision), str)


def short_name(hub: HfUri) -> str:
    """The shortest name, without the revision, that resolves to the same place."""
    if is_gguf(hub.path_in_repo):
        return f"{hub.id}:{hub.path_in_repo}"
    return f"{_HUB}{hub.id}/{hub.path_in_repo}" if hub.path_in_repo else hub.id


def commit_of(folder: Path) -> str | None:
    """The commit that a folder of the Hub's cache belongs to; None for any other folder."""
    for place in (folder, *folder.parents):
        if place.parent.name == _SNAPSHOTS and _COMMIT.fullmatch(place.name):
            return place.name
    return None

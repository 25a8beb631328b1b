"""Send what a folder holds to a repository of the Hub, as one commit, with a model card."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from deltamem_tool.adapter.config_file import CONFIG_FILE
from deltamem_tool.errors import DeltaMemError, HubError
from deltamem_tool.hub.card import says_license, write_card
from deltamem_tool.hub.contents import ADAPTER_FILES, CARD_FILE, ONNX_PATHS, Contents, read_contents
from deltamem_tool.hub.public_base import Base, with_public_base
from deltamem_tool.hub.repository import DELETED, MAIN, SAME, Change, Files, Repository, There
from deltamem_tool.io.names import fetch, hub_id, on_hub
from deltamem_tool.onnx.contract import MANIFEST_FILE, Manifest
from deltamem_tool.onnx.locate import ONNX_FOLDER


@dataclass(frozen=True)
class Pushed:
    """What was pushed, or what would be."""

    repo_id: str
    url: str  # of the repository, the branch, or the pull request
    commit: str | None  # that holds it; None if nothing was sent
    changes: list[Change]
    notes: list[str] = field(default_factory=list)
    card: str = field(default="", repr=False)


def push(
    folder: str | Path,
    repo_id: str,
    *,
    onnx: str | Path | None = None,
    base_model: str | None = None,
    evaluation: str | Path | None = None,
    license: str | None = None,
    branch: str | None = None,
    create_pr: bool = False,
    message: str | None = None,
    private: bool = False,
    dry_run: bool = False,
    ask_license: Callable[[], str | None] | None = None,
) -> Pushed:
    """Send an adapter folder, an ONNX folder, or both to the Hub.

    The commit is made only if the branch is still what it was when the push began. Files that have not changed are not
    sent; files of ours that are gone here are deleted there; all others are left alone.

    Args:
        folder: an adapter folder, perhaps with an ONNX folder `onnx` in it; or an ONNX folder, which goes into `onnx/`.
        repo_id: `owner/name`; it is made if it is not there.
        onnx: an ONNX folder of the same adapter that is elsewhere.
        base_model: the base's Hub id, perhaps with `@revision`, where the adapter records a folder of this machine.
        evaluation: what `deltamem eval --out` wrote, if it is not `evaluation.json` in `folder`.
        license: identifier for the card, such as "apache-2.0".
        branch: made from `main` if it is not there.
        create_pr: propose the commit as a pull request.
        message: of the commit.
        private: make a new repository private; one that is there must be.
        dry_run: send nothing.
        ask_license: asked where neither `license` nor the card says one.

    Raises:
        HubError: the Hub does not take it, or it is not known whether it did: the message says which.
        AdapterError, ExportError, DataError: what shall be sent is damaged. Nothing was sent.
    """
    repository = Repository(hub_id(repo_id), branch or MAIN, create_pr)
    found = read_contents(Path(folder), _path(onnx), _path(evaluation))
    contents, base = with_public_base(found, base_model)
    there = repository.look()
    if private and there.commit is not None and not there.is_private:
        raise HubError(
            f"{repo_id} is there already, and it is public.",
            "Nothing was sent.",
            "Make it private in its settings, or choose another name.",
        )
    known, notes = _together(contents, repository, there)
    if contents.adapter is None and known.adapter is not None:  # which knows more of it than a graph does
        base = Base(known.adapter.base.name, known.adapter.base.revision)
    old = contents.card if contents.card is not None else repository.content(CARD_FILE, there)
    if license is None and ask_license is not None and not (old and says_license(old)):
        license = ask_license()
    card = write_card(known, repository.repo_id, base, old, license)
    if not says_license(card):
        notes.append("The card names no licence: pass --license, such as apache-2.0, or add it to the card.")
    files = {**contents.files, CARD_FILE: card}
    changes = _changes(files, contents, there)
    if dry_run or all(change.kind == SAME for change in changes):
        return Pushed(
            repository.repo_id, repository.url, None if dry_run else there.commit, changes, notes, card.decode()
        )
    there = repository.create(there, private)
    commit, url = repository.commit(files, changes, there, message or f"Upload {' and '.join(contents.parts)}")
    return Pushed(repository.repo_id, url, commit, changes, notes, card.decode())


def _path(path: str | Path | None) -> Path | None:
    return None if path is None else Path(path)


def _together(contents: Contents, repository: Repository, there: There) -> tuple[Contents, list[str]]:
    """What the repository will hold, for the card to describe: what is pushed, and the other part that is there.

    Raises:
        HubError: that part is of another adapter, and would be refused by whoever fetches both.
    """
    manifest = f"{ONNX_FOLDER}/{MANIFEST_FILE}"
    missing, mark = ("ONNX folder", manifest) if contents.adapter else ("adapter", CONFIG_FILE)
    if (contents.adapter and contents.onnx) or mark not in there.files:
        return contents, []
    at_head = on_hub(repository.repo_id, there.commit)
    folder = fetch(at_head, [manifest] if contents.adapter else ADAPTER_FILES, "repository")
    try:
        if contents.adapter:  # the graph and its weights need not come for this
            found = Manifest.read(folder / ONNX_FOLDER)
            other = Contents({}, None, found)
        else:
            other = read_contents(folder)
    except DeltaMemError as error:
        return contents, [f"The {missing} that is there cannot be read, so the card does not describe it: {error.what}"]
    if other.fingerprint != contents.fingerprint:
        raise HubError(
            f"The {missing} in {repository.repo_id} is of another adapter. Nothing was sent.",
            "A repository that holds parts of two is refused by whoever fetches it.",
            f"Push both parts of this one (--onnx), remove the {missing} there, or choose another name.",
        )
    return contents.beside(other), []


def _changes(files: Files, contents: Contents, there: There) -> list[Change]:
    """What becomes of every file of ours, sorted by path."""
    ours = {*(ADAPTER_FILES if contents.adapter else ()), *(ONNX_PATHS if contents.onnx else ())}
    gone = (ours & there.files.keys()) - files.keys()
    changes = [there.change(path, content) for path, content in files.items()]
    changes += [Change(path, there.files[path].size, DELETED) for path in gone]
    return sorted(changes, key=lambda change: change.path)

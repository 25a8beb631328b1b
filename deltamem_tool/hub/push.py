"""Push a folder to a repository on the Hub, in one commit with a model card."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from deltamem_tool.adapter.config_file import CONFIG_FILE
from deltamem_tool.errors import ConfigError, DeltaMemError, HubError
from deltamem_tool.hub.card import has_license, write_card
from deltamem_tool.hub.contents import ADAPTER_FILES, CARD_FILE, ONNX_PATHS, Contents, read_contents
from deltamem_tool.hub.public_base import Base, with_public_base
from deltamem_tool.hub.repository import DELETED, MAIN, SAME, Change, Files, RemoteTree, Repository
from deltamem_tool.hub.space import Space, check_space
from deltamem_tool.io.names import BUILTIN, expand_user, fetch, hub_id, hub_uri, resolve_folder
from deltamem_tool.onnx.contract import MANIFEST_FILE, MODEL_FILE
from deltamem_tool.onnx.locate import ONNX_FOLDER
from deltamem_tool.onnx.manifest import Manifest


@dataclass(frozen=True)
class PushResult:
    """The result of a push, or of a dry run.

    Args:
        repo_id: `owner/name`.
        url: URL of the repository, the branch, or the pull request.
        commit: the commit with these files; None in a dry run.
        changes: one entry per file.
        notes: notes for the user.
        card: the model card.
        space: URL of the Space, if one was pushed.
        space_changes: one entry per file of the Space.
    """

    repo_id: str
    url: str
    commit: str | None
    changes: list[Change]
    notes: list[str] = field(default_factory=list)
    card: str = field(default="", repr=False)
    space: str | None = None
    space_changes: list[Change] = field(default_factory=list)


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
    space: bool = False,
    runtime: Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> PushResult:
    """Push an adapter folder, an ONNX folder, or both to the Hub.

    The commit is made only if nobody else has changed the branch since the push began. Files that have not changed are
    not sent. Files of the adapter or the ONNX folder that no longer exist locally are deleted from the repository. All
    other files in it are left alone.

    Args:
        folder: an adapter folder, which may contain an ONNX folder `onnx`; an ONNX folder, which goes into `onnx/`; or
            the name of a shipped adapter, such as `builtin:adapter`.
        repo_id: `owner/name`; created if it does not exist.
        onnx: an ONNX folder of the same adapter, if it is not in `folder`.
        base_model: Hub id of the base model, optionally with `@revision`, if the adapter records a local folder.
        evaluation: file written by `deltamem eval --out`; by default `evaluation.json` in `folder`.
        license: licence identifier for the model card, such as "apache-2.0".
        branch: branch to push to, created from `main` if it does not exist.
        create_pr: open a pull request with the commit.
        message: commit message.
        private: make a new repository private; an existing one must be private.
        dry_run: send nothing; return what would change.
        ask_license: called for the licence if neither `license` nor the model card names one.
        space: also push a web page of the ONNX folder, as a static Space of the same name that the model card links to.
        runtime: node_modules folder of npm with the packages that the page needs; by default they are fetched once.
        progress: called with a description of each step.

    Raises:
        HubError: the Hub rejected the push, or its answer was lost; the message says which.
        AdapterError: the adapter is damaged; nothing was sent.
        ExportError: the ONNX folder is damaged; nothing was sent.
        DataError: the evaluation is damaged; nothing was sent.
        ConfigError: `space` is combined with a branch or a pull request, or `runtime` is given without it; nothing was
            sent.

    Example:
        >>> import deltamem_tool as deltamem
        >>> plan = deltamem.push("my-adapter", "someone/my-adapter", license="mit", dry_run=True)
        >>> "deltamem.safetensors" in [change.path for change in plan.changes]
        True
        >>> result = deltamem.push("my-adapter", "someone/my-adapter", license="mit")
        >>> result.url.endswith("/someone/my-adapter")
        True
    """
    if space:
        check_space(branch, create_pr)
    elif runtime is not None:
        raise ConfigError("--runtime applies to the page of a Space.", "", "Add --space, or leave out --runtime.")
    repository = Repository(hub_id(repo_id), branch or MAIN, create_pr)
    paths = [None if path is None else expand_user(path) for path in (onnx, evaluation)]
    contents, base = with_public_base(read_contents(_local_folder(folder), *paths), base_model)
    remote = repository.read()
    if private and remote.commit is not None and not remote.is_private:
        raise HubError(
            f"{repo_id} already exists, and it is public. Nothing was sent.",
            "--private applies to a new repository.",
            "Make it private in its settings, or choose another name.",
        )
    described, notes = _card_contents(contents, repository, remote)
    if contents.adapter is None and described.adapter is not None:  # which also records a revision
        base = Base(described.adapter.base.name, described.adapter.base.revision)
    old = contents.card if contents.card is not None else repository.content(CARD_FILE, remote)
    if license is None and ask_license is not None and not (old and has_license(old)):
        license = ask_license()
    with ExitStack() as stack:
        page = None
        if space:
            page_folder = Path(stack.enter_context(TemporaryDirectory(ignore_cleanup_errors=True)))
            page = Space(
                repository.repo_id,
                _onnx_folder(contents, folder),
                page_folder,
                license,
                private,
                runtime,
                progress or (lambda _: None),
            )
        card = write_card(described, repository.repo_id, base, old, license, None if page is None else page.url)
        if not has_license(card):
            notes.append("The model card names no licence: pass --license, such as apache-2.0, or add it to the card.")
        files = {**contents.files, CARD_FILE: card}
        changes = _changes(files, contents, remote)
        commit, url = remote.commit, repository.url
        if not dry_run and any(change.kind != SAME for change in changes):
            remote = repository.create(remote, private)
            commit, url = repository.commit(files, changes, remote, message or f"Upload {' and '.join(contents.parts)}")
        if not dry_run and page is not None:
            page.push()
        return PushResult(
            repo_id=repository.repo_id,
            url=url,
            commit=None if dry_run else commit,
            changes=changes,
            notes=notes,
            card=card.decode(),
            space=None if page is None else page.url,
            space_changes=[] if page is None else page.changes,
        )


def _local_folder(folder: str | Path) -> Path:
    """Return the path of `folder`, which may be the name of a shipped adapter.

    Raises:
        HubError: the package does not ship an adapter of this name.
    """
    name = str(folder)
    return resolve_folder(name, None, ADAPTER_FILES, "adapter") if name.startswith(BUILTIN) else expand_user(folder)


def _onnx_folder(contents: Contents, folder: str | Path) -> Path:
    """Return the path of the ONNX folder in `contents`.

    Raises:
        HubError: `contents` has no ONNX folder.
    """
    graph = contents.files.get(f"{ONNX_FOLDER}/{MODEL_FILE}")
    if not isinstance(graph, Path):
        raise HubError(
            f"{folder} has no ONNX folder. Nothing was sent.",
            "The page of a Space needs one.",
            "Pass one with --onnx: `deltamem export ADAPTER --target web --out onnx-web`.",
        )
    return graph.parent


def _card_contents(contents: Contents, repository: Repository, remote: RemoteTree) -> tuple[Contents, list[str]]:
    """Return the contents that the card describes, and notes. They include a part that is only in the repository.

    Raises:
        HubError: the part in the repository is of another adapter.
    """
    manifest = f"{ONNX_FOLDER}/{MANIFEST_FILE}"
    part, file = ("ONNX folder", manifest) if contents.adapter else ("adapter", CONFIG_FILE)
    if (contents.adapter and contents.onnx) or file not in remote.files:
        return contents, []
    at_head = hub_uri(repository.repo_id, remote.commit)
    folder = fetch(at_head, [manifest] if contents.adapter else ADAPTER_FILES, "repository")
    try:
        # The graph and its weights need not be fetched for this.
        other = Contents({}, None, Manifest.read(folder / ONNX_FOLDER)) if contents.adapter else read_contents(folder)
    except DeltaMemError as error:
        return contents, [f"The repository's {part} cannot be read, so the card does not describe it: {error.what}"]
    if other.fingerprint != contents.fingerprint:
        raise HubError(
            f"The {part} in {repository.repo_id} is of another adapter. Nothing was sent.",
            "A repository with parts of two adapters cannot be used.",
            f"Push both parts of this one (--onnx), remove the {part} there, or choose another name.",
        )
    return contents.merge(other), []


def _changes(files: Files, contents: Contents, remote: RemoteTree) -> list[Change]:
    """The change to every file of the pushed parts, sorted by path."""
    parts = {*(ADAPTER_FILES if contents.adapter else ()), *(ONNX_PATHS if contents.onnx else ())}
    deleted = (parts & remote.files.keys()) - files.keys()
    changes = [remote.change(path, content) for path, content in files.items()]
    changes += [Change(path, remote.files[path].size, DELETED) for path in deleted]
    return sorted(changes, key=lambda change: change.path)

"""A static Space on the Hub, with the page that runs a model in the visitor's browser."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import yaml

from deltamem_tool.errors import ConfigError, HubError
from deltamem_tool.hub.repository import DELETED, MAIN, SAME, SPACE, Change, RemoteTree, Repository
from deltamem_tool.page.build import make_page

CARD_FILE = "README.md"
_FOLDERS = ("library/", "model/", "runtime/")  # folders in which all files belong to the page


class Space:
    """A Space with the page of an ONNX folder, under the same name as the repository `repo_id`.

    Args:
        repo_id: `owner/name`.
        onnx: the ONNX folder.
        folder: an empty folder in which the page is created.
        license: licence for the Space's card.
        private: make a new Space private; an existing one must be private.
        runtime: as in `page.build.make_page`.
        progress: called with a description of each step.

    Raises:
        ExportError: the ONNX folder does not run in a browser.
        InstallationError: the packages of the page are not available.
        HubError: the Space cannot be read, or `private` is set and it is public.
    """

    def __init__(
        self,
        repo_id: str,
        onnx: Path,
        folder: Path,
        license: str | None,
        private: bool,
        runtime: Path | None,
        progress: Callable[[str], None],
    ) -> None:
        self._private = private
        self._repository = Repository(repo_id, MAIN, kind=SPACE)
        self.url = self._repository.url
        self._remote = self._repository.read()
        if private and self._remote.commit is not None and not self._remote.is_private:
            raise HubError(
                f"The Space {repo_id} already exists, and it is public. Nothing was sent.",
                "--private applies only to a new Space.",
                "Make it private in its settings, or leave out --space.",
            )
        page = make_page(onnx, folder / "page", runtime=runtime, progress=progress).path
        self._files: dict[str, Path | bytes] = {
            path.relative_to(page).as_posix(): path for path in page.rglob("*") if path.is_file()
        }
        if CARD_FILE not in self._remote.files:  # an existing card may have been edited by the user
            self._files[CARD_FILE] = _card(repo_id, license)
        self.changes = _changes(self._files, self._remote)

    def push(self) -> str | None:
        """Make the commit if anything has changed, and return the head.

        Raises:
            HubError: the Hub rejects the commit, or its answer was lost.
        """
        if all(change.kind == SAME for change in self.changes):
            return self._remote.commit
        remote = self._repository.create(self._remote, self._private)
        return self._repository.commit(self._files, self.changes, remote, "Upload page")[0]


def check_space(branch: str | None, create_pr: bool) -> None:
    """Check that a Space can be pushed together with the repository.

    Raises:
        ConfigError: the repository's files are not pushed to its branch `main`.
    """
    if create_pr or branch not in (None, MAIN):
        raise ConfigError(
            "A Space is pushed only to its main branch.",
            "It would show files that the repository does not have in its main branch yet.",
            "Leave out --branch and --create-pr, or --space.",
        )


def _card(repo_id: str, license: str | None) -> bytes:
    metadata = {
        "title": repo_id.partition("/")[2],
        "emoji": "🧠",
        "sdk": "static",
        "models": [repo_id],
        **({} if license is None else {"license": license}),
    }
    text = "The model runs, and keeps its memories, in the visitor's browser. Made with `deltamem page`."
    return f"---\n{yaml.safe_dump(metadata, allow_unicode=True, sort_keys=False)}---\n\n{text}\n".encode()


def _changes(files: dict[str, Path | bytes], remote: RemoteTree) -> list[Change]:
    deleted = {path for path in remote.files if path.startswith(_FOLDERS)} - files.keys()
    changes = [remote.change(path, content) for path, content in files.items()]
    changes += [Change(path, remote.files[path].size, DELETED) for path in deleted]
    return sorted(changes, key=lambda change: change.path)

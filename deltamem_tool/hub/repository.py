"""A repository on the Hub, as a push needs it: read, compare, create and change it."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

from deltamem_tool._compat import RepoFile, git_hash, sha_fileobj
from deltamem_tool._version import __version__
from deltamem_tool.errors import HubError
from deltamem_tool.io.hub_errors import CLIENT_ERRORS, hub_error, may_have_landed, system_error

LIBRARY = "deltamem-tool"
MAIN = "main"
MODEL, SPACE = "model", "space"  # kinds of repositories
NEW, CHANGED, SAME, DELETED = "new", "changed", "same", "deleted"
Files = Mapping[str, Path | bytes]  # files by their path in the repository
_INITIAL_FILES = {  # files of a new repository
    MODEL: {".gitattributes"},
    SPACE: {".gitattributes", "README.md", "index.html", "style.css"},
}


@dataclass(frozen=True)
class Change:
    """The change of one file of the repository in a push."""

    path: str
    size: int
    kind: str  # NEW, CHANGED, SAME or DELETED


@dataclass(frozen=True)
class RemoteTree:
    """The head of a branch.

    Args:
        commit: None if the repository does not exist.
        has_branch: whether the branch exists; if not, the head is that of `main`.
        is_private: whether the repository is private.
        files: files by path.
    """

    commit: str | None
    has_branch: bool = False
    is_private: bool = False
    files: Mapping[str, RepoFile] = field(default_factory=dict)

    def change(self, path: str, content: Path | bytes) -> Change:
        """Compare a local file with the one at `path`, by the hash of its bytes."""
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        old = self.files.get(path)
        kind = NEW if old is None else SAME if _is_same(content, size, old) else CHANGED
        return Change(path, size, kind)


def _is_same(content: Path | bytes, size: int, remote: RepoFile) -> bool:
    if size != remote.size:
        return False
    with io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as file:
        if remote.lfs is not None:
            return bool(sha_fileobj(file).hex() == remote.lfs.sha256)
        return bool(git_hash(file.read()) == remote.blob_id)


class Repository:
    """A branch of a repository; with `create_pr`, changes become a pull request to it.

    Args:
        repo_id: `owner/name`.
        branch: branch that is read and changed.
        create_pr: open a pull request instead of committing to the branch.
        kind: MODEL or SPACE, a static Space.
    """

    def __init__(self, repo_id: str, branch: str = MAIN, create_pr: bool = False, kind: str = MODEL) -> None:
        self.repo_id, self.branch, self.create_pr, self.kind = repo_id, branch, create_pr, kind
        self._api = HfApi(library_name=LIBRARY, library_version=__version__)

    @property
    def url(self) -> str:
        """URL of the branch."""
        url = f"{self._api.endpoint}/{'spaces/' if self.kind == SPACE else ''}{self.repo_id}"
        return url if self.branch == MAIN else f"{url}/tree/{self.branch}"

    def read(self) -> RemoteTree:
        """Return the head of the branch.

        Raises:
            HubError: the branch cannot be read.
        """
        try:
            has_branch = True
            try:
                info = self._info(self.branch)
            except RevisionNotFoundError:
                if self.branch == MAIN:
                    raise
                info, has_branch = self._info(MAIN), False
            entries = self._api.list_repo_tree(self.repo_id, recursive=True, revision=info.sha, repo_type=self.kind)
            files = {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
        except RepositoryNotFoundError:
            return RemoteTree(None)
        except CLIENT_ERRORS as error:
            raise hub_error(error, self.repo_id, f"{self.repo_id} cannot be read. Nothing was sent.") from error
        return RemoteTree(info.sha, has_branch, bool(getattr(info, "private", False)), files)

    def _info(self, revision: str) -> Any:
        # Without a timeout the client would wait forever.
        timeout = constants.HF_HUB_ETAG_TIMEOUT
        return self._api.repo_info(self.repo_id, revision=revision, repo_type=self.kind, timeout=timeout)

    def content(self, path: str, remote: RemoteTree) -> bytes | None:
        """Return the bytes of a file, or None if it does not exist.

        Raises:
            HubError: the file cannot be fetched.
        """
        if path not in remote.files:
            return None
        with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            try:
                file = self._api.hf_hub_download(
                    self.repo_id, path, revision=remote.commit, local_dir=folder, repo_type=self.kind
                )
            except CLIENT_ERRORS as error:
                raise hub_error(error, self.repo_id, f"{path} of {self.repo_id} cannot be read.") from error
            return Path(file).read_bytes()

    def create(self, remote: RemoteTree, private: bool) -> RemoteTree:
        """Create the repository or the branch if it is missing, and return its head.

        Raises:
            HubError: the Hub does not allow it, or somebody else created the repository at the same time.
        """
        target = self.repo_id if remote.commit is None else f"The branch {self.branch} of {self.repo_id}"
        try:
            if remote.commit is None:
                sdk = "static" if self.kind == SPACE else None
                self._api.create_repo(self.repo_id, private=private or None, repo_type=self.kind, space_sdk=sdk)
            if self.branch != MAIN and not remote.has_branch:
                self._api.create_branch(self.repo_id, branch=self.branch, revision=remote.commit, repo_type=self.kind)
        except CLIENT_ERRORS as error:
            what = f"{target} cannot be created. None of your files was sent."
            raise hub_error(error, self.repo_id, what, writing=True) from error
        if remote.commit is not None:  # the new commit's parent must be the commit that the files were compared with
            return replace(remote, has_branch=True)
        now = self.read()
        if now.files.keys() - _INITIAL_FILES[self.kind]:
            raise HubError(
                f"{self.repo_id} was created by somebody else at the same time. None of your files was sent.",
                "It already contains other files.",
                "Check them, and push again.",
            )
        return now

    def commit(self, files: Files, changes: Sequence[Change], remote: RemoteTree, message: str) -> tuple[str, str]:
        """Make the commit if the head of the branch is still `remote`. Return its id and its URL.

        Raises:
            HubError: the commit was not made, or the Hub's answer was lost; the message says which.
        """
        operations: list[CommitOperationAdd | CommitOperationDelete] = []
        for change in changes:
            if change.kind == DELETED:
                operations.append(CommitOperationDelete(change.path, is_folder=False))
            elif change.kind != SAME:
                operations.append(CommitOperationAdd(change.path, files[change.path]))
        try:
            info = self._api.create_commit(
                self.repo_id,
                operations,
                commit_message=message,
                revision=self.branch,
                create_pr=self.create_pr,
                parent_commit=remote.commit,
                repo_type=self.kind,
            )
        except CLIENT_ERRORS as error:
            if local := system_error(error):
                raise local from error
            is_lost = may_have_landed(error)
            commit = self._find_commit(files, changes, remote) if is_lost else None
            if commit is not None:
                return commit, self.url
            what = "The Hub's answer was lost: so far {} has" if is_lost else "{} has not been changed: it has"
            what = f"{what.format(self.repo_id)} nothing of this push."
            raise hub_error(error, self.repo_id, what, writing=True) from error
        return info.oid, info.pr_url or self.url

    def _find_commit(self, files: Files, changes: Sequence[Change], remote: RemoteTree) -> str | None:
        """Return the commit if it was made although the answer was lost, or None.

        Raises:
            HubError: this cannot be determined.
        """
        if self.create_pr:
            raise HubError(
                f"The Hub's answer was lost: a pull request to {self.repo_id} may or may not have been opened.",
                "Nothing else has changed.",
                f"Check {self._api.endpoint}/{self.repo_id}/discussions before you push again.",
            )
        try:
            now = self.read()
        except HubError as error:
            raise HubError(
                f"The Hub's answer was lost: {self.repo_id} has either all of this push or none of it.",
                error.why,
                "Push again: only missing files are sent.",
            ) from error
        if now.commit == remote.commit:
            return None
        applied = [
            change.path not in now.files
            if change.kind == DELETED
            else now.change(change.path, files[change.path]).kind == SAME
            for change in changes
        ]
        if not all(applied):
            raise HubError(
                f"The Hub's answer was lost, and somebody else changed {self.repo_id} in the meantime.",
                "Its commits contain either all of this push or none of it.",
                f"Check {self._api.endpoint}/{self.repo_id}/commits/{self.branch}, and push again.",
            )
        return now.commit

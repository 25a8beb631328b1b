"""A repository of the Hub as a push meets it: looked at, compared, made, and changed by one commit."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelInfo, constants
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

from deltamem_tool._compat import RepoFile, git_hash, sha_fileobj
from deltamem_tool._version import __version__
from deltamem_tool.errors import HubError
from deltamem_tool.io.hub_errors import CLIENT_ERRORS, hub_error, may_have_landed, system_error

LIBRARY = "deltamem-tool"
MAIN = "main"
NEW, CHANGED, SAME, DELETED = "new", "changed", "same", "deleted"
Files = Mapping[str, Path | bytes]  # by path in the repository
_FROM_THE_START = {".gitattributes"}  # what a repository holds that has just been made


@dataclass(frozen=True)
class Change:
    """What a push does to one file of the repository."""

    path: str
    size: int
    kind: str  # NEW, CHANGED, SAME or DELETED


@dataclass(frozen=True)
class There:
    """What is at the head of a branch."""

    commit: str | None  # None: there is no such repository
    has_branch: bool = False
    is_private: bool = False
    files: Mapping[str, RepoFile] = field(default_factory=dict)

    def change(self, path: str, content: Path | bytes) -> Change:
        """What a file here would do to the one there, which is known by the hash of its bytes."""
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        old = self.files.get(path)
        kind = NEW if old is None else SAME if _is_same(content, size, old) else CHANGED
        return Change(path, size, kind)


def _is_same(content: Path | bytes, size: int, there: RepoFile) -> bool:
    if size != there.size:
        return False
    with io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as file:
        if there.lfs is not None:
            return sha_fileobj(file).hex() == there.lfs.sha256
        return git_hash(file.read()) == there.blob_id


class Repository:
    """`branch` of the repository `repo_id`, and how to change it; with `create_pr`, by a pull request to it."""

    def __init__(self, repo_id: str, branch: str = MAIN, create_pr: bool = False) -> None:
        self.repo_id, self.branch, self.create_pr = repo_id, branch, create_pr
        self._api = HfApi(library_name=LIBRARY, library_version=__version__)

    @property
    def url(self) -> str:
        """Where a reader meets it."""
        place = f"{self._api.endpoint}/{self.repo_id}"
        return place if self.branch == MAIN else f"{place}/tree/{self.branch}"

    def look(self) -> There:
        """What is there now.

        Raises:
            HubError: the Hub does not say.
        """
        try:
            has_branch = True
            try:
                info = self._info(self.branch)
            except RevisionNotFoundError:
                if self.branch == MAIN:
                    raise
                info, has_branch = self._info(MAIN), False
            entries = self._api.list_repo_tree(self.repo_id, recursive=True, revision=info.sha)
            files = {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
        except RepositoryNotFoundError:
            return There(None)
        except CLIENT_ERRORS as error:
            raise hub_error(error, self.repo_id, f"{self.repo_id} cannot be read. Nothing was sent.") from error
        return There(info.sha, has_branch, bool(getattr(info, "private", False)), files)

    def _info(self, revision: str) -> ModelInfo:
        # Without a time of ours the client would wait for ever.
        return self._api.model_info(self.repo_id, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)

    def content(self, path: str, there: There) -> bytes | None:
        """Of a file that is there; None if it is not."""
        if path not in there.files:
            return None
        with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            try:
                file = self._api.hf_hub_download(self.repo_id, path, revision=there.commit, local_dir=folder)
            except CLIENT_ERRORS as error:
                raise hub_error(error, self.repo_id, f"{path} of {self.repo_id} cannot be read.") from error
            return Path(file).read_bytes()

    def create(self, there: There, private: bool) -> There:
        """Make what is missing, the repository or the branch; what is there then.

        Raises:
            HubError: the Hub does not let you, or somebody else was faster.
        """
        what = self.repo_id if there.commit is None else f"The branch {self.branch} of {self.repo_id}"
        try:
            if there.commit is None:
                self._api.create_repo(self.repo_id, private=private or None)
            if self.branch != MAIN and not there.has_branch:
                self._api.create_branch(self.repo_id, branch=self.branch, revision=there.commit)
        except CLIENT_ERRORS as error:
            what = f"{what} cannot be made. None of your files was sent."
            raise hub_error(error, self.repo_id, what, writing=True) from error
        if there.commit is not None:  # the commit shall follow the one that the files were compared with
            return replace(there, has_branch=True)
        now = self.look()
        if now.files.keys() - _FROM_THE_START:
            raise HubError(
                f"{self.repo_id} has been made meanwhile, by somebody else too.",
                "None of your files was sent.",
                "Look at what is there, and push again.",
            )
        return now

    def commit(self, files: Files, changes: Sequence[Change], there: There, message: str) -> tuple[str, str]:
        """Make the commit, if the branch is still as it was `there`; its id, and where to look at it.

        Raises:
            HubError: nothing has changed there; or it is not known, which is said.
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
                parent_commit=there.commit,
            )
        except CLIENT_ERRORS as error:
            if refused := system_error(error):
                raise refused from error
            is_lost = may_have_landed(error)
            commit = self._landed(files, changes, there) if is_lost else None
            if commit is not None:
                return commit, self.url
            what = "The Hub's answer was lost: so far {} holds" if is_lost else "{} has not been changed: it holds"
            what = f"{what.format(self.repo_id)} nothing of this push."
            raise hub_error(error, self.repo_id, what, writing=True) from error
        return info.oid, info.pr_url or self.url

    def _landed(self, files: Files, changes: Sequence[Change], there: There) -> str | None:
        """The commit, if it was made although the answer to it was lost.

        Raises:
            HubError: that cannot be found out.
        """
        if self.create_pr:
            raise HubError(
                f"The answer of the Hub was lost: a pull request to {self.repo_id} may be there, or not.",
                "Nothing else has changed.",
                f"Look at {self._api.endpoint}/{self.repo_id}/discussions before you push again.",
            )
        try:
            now = self.look()
        except HubError as error:
            raise HubError(
                f"The Hub's answer was lost: {self.repo_id} holds this push as a whole, or nothing of it.",
                error.why,
                "Push again: it finds what is there, and sends only what is not.",
            ) from error
        if now.commit == there.commit:
            return None
        holds = [
            change.path not in now.files
            if change.kind == DELETED
            else now.change(change.path, files[change.path]).kind == SAME
            for change in changes
        ]
        if not all(holds):
            raise HubError(
                f"The Hub's answer was lost, and somebody else has changed {self.repo_id} meanwhile.",
                "This push is among its commits as a whole, or not at all.",
                f"Look at {self._api.endpoint}/{self.repo_id}/commits/{self.branch}, and push again.",
            )
        return now.commit

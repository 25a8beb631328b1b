"""The Hub's repositories with their commits, refs and large files, all in memory."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fnmatch import fnmatch
from functools import cached_property
from types import MappingProxyType
from typing import Any

# Patterns in the .gitattributes of a new repository.
LFS_PATTERNS = tuple(
    "*.7z *.arrow *.bin *.bz2 *.ckpt *.ftz *.gz *.h5 *.joblib *.mlmodel *.model *.msgpack *.npy *.npz *.onnx *.ot "
    "*.parquet *.pb *.pickle *.pkl *.pt *.pth *.rar *.safetensors *.tar *.tflite *.tgz *.wasm *.xz *.zip *.zst "
    "*tfevents*".split()
)
LFS_SIZE = 10 << 20  # larger files always go to large-file storage
BRANCH = "refs/heads/"
TAG = "refs/tags/"
PULL_REQUEST = "refs/pr/"


class HubError(Exception):
    """An error of the Hub. `code` is its X-Error-Code, from which the client chooses the exception."""

    def __init__(
        self, status: int, message: str, code: str | None = None, headers: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, headers


def git_oid(kind: str, content: bytes) -> str:
    """The id that `git hash-object` prints."""
    return hashlib.sha1(f"{kind} {len(content)}\0".encode() + content).hexdigest()


def belongs_in_lfs(path: str, sample: bytes, size: int) -> bool:
    """Whether a file belongs in large-file storage because of its name or size, or because it is not text."""
    name = path.rsplit("/", 1)[-1]
    text = not sample or re.fullmatch(rb"[^\0-\x06\x0e-\x1a]*", sample) is not None
    return size > LFS_SIZE or not text or any(fnmatch(name, pattern) for pattern in LFS_PATTERNS)


@dataclass(frozen=True)
class Blob:
    """A file of a commit. If it is in large-file storage, git itself has only a pointer to it."""

    content: bytes
    lfs: bool

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def pointer(self) -> bytes:
        lines = ("version https://git-lfs.github.com/spec/v1", f"oid sha256:{self.sha256}", f"size {self.size}")
        return "".join(f"{line}\n" for line in lines).encode()

    @cached_property
    def oid(self) -> str:
        return git_oid("blob", self.pointer if self.lfs else self.content)

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid

    @property
    def size(self) -> int:
        return len(self.content)

    def entry(self, path: str) -> dict[str, Any]:
        """The entry of the file in a tree listing."""
        large = {"oid": self.sha256, "size": self.size, "pointerSize": len(self.pointer)}
        return {"type": "file", "oid": self.oid, "size": self.size, "path": path} | ({"lfs": large} if self.lfs else {})


def as_blob(path: str, content: bytes) -> Blob:
    """The file, stored in the way in which the client must send it. An empty file is never a large one."""
    return Blob(content, bool(content) and belongs_in_lfs(path, content[:512], len(content)))


@dataclass(frozen=True)
class Commit:
    sha: str
    parent: str | None
    files: Mapping[str, Blob]
    message: str
    description: str = ""
    author: str = ""
    date: str = field(default_factory=lambda: datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z"))

    def folders(self) -> dict[str, str]:
        """The oid of each folder by its path."""
        entries: dict[str, list[str]] = {}
        for path, blob in sorted(self.files.items()):
            parts = path.split("/")
            for length in range(1, len(parts)):
                entries.setdefault("/".join(parts[:length]), []).append(f"{path} {blob.oid}")
        return {folder: git_oid("tree", "\n".join(below).encode()) for folder, below in entries.items()}

    def tree(self, folder: str, recursive: bool) -> list[dict[str, Any]]:
        """Entries below `folder`, in the order of their paths."""
        folders = self.folders()
        if folder and folder not in folders:
            raise HubError(
                404, f"{folder} does not exist on this revision", "EntryNotFound", {"X-Repo-Commit": self.sha}
            )
        entries = [blob.entry(path) for path, blob in self.files.items()]
        entries += [{"type": "directory", "oid": oid, "size": 0, "path": path} for path, oid in folders.items()]
        start = f"{folder}/" if folder else ""
        below = [entry for entry in entries if entry["path"].startswith(start)]
        if not recursive:
            below = [entry for entry in below if "/" not in entry["path"][len(start) :]]
        return sorted(below, key=lambda entry: entry["path"])


@dataclass
class Repository:
    """A model, dataset or Space; `refs` has the full name of every branch, tag and pull request with its commit."""

    kind: str  # as in a path of the API: models, datasets or spaces
    id: str
    private: bool = False
    gated: bool = False
    granted: frozenset[str] = frozenset()  # accounts that may download from a gated repository, besides its owner
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)  # large files by SHA-256
    discussions: list[dict[str, Any]] = field(default_factory=list)

    @property
    def owner(self) -> str:
        return self.id.split("/")[0]

    @property
    def web_path(self) -> str:
        return self.id if self.kind == "models" else f"{self.kind}/{self.id}"

    def ref(self, revision: str) -> str | None:
        """The full name of a branch, tag or pull request."""
        names = (revision, BRANCH + revision, TAG + revision)
        return next((name for name in names if name in self.refs), None)

    def resolve(self, revision: str) -> Commit:
        """The commit that a revision names."""
        ref = self.ref(revision)
        sha = self.refs[ref] if ref else revision
        if sha not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[sha]

    def commit(
        self, ref: str, files: Mapping[str, Blob], message: str, parent: str | None, description: str = "", by: str = ""
    ) -> Commit:
        """Add a commit to `ref`, which is created if needed."""
        digested = [self.kind, self.id, str(parent), message, str(len(self.commits))]
        digested += [f"{path} {blob.oid}" for path, blob in sorted(files.items())]
        new = Commit(git_oid("commit", "\n".join(digested).encode()), parent, dict(files), message, description, by)
        self.commits[new.sha] = new
        self.refs[ref] = new.sha
        self.objects.update((blob.sha256, blob.content) for blob in files.values() if blob.lfs)
        return new

    def discuss(self, title: str, author: str, description: str = "", is_pull_request: bool = True) -> int:
        """Open a discussion, and return its number."""
        number = len(self.discussions) + 1
        self.discussions.append(
            {
                "num": number,
                "title": title,
                "description": description,
                "author": {"name": author},
                "status": "draft" if is_pull_request else "open",
                "isPullRequest": is_pull_request,
                "createdAt": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z"),
                "repo": {"name": self.id, "type": self.kind.removesuffix("s")},
            }
        )
        return number

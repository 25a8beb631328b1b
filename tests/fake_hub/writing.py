"""Requests that write: repositories, branches, large files, commits."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from dataclasses import dataclass, field
from math import ceil
from typing import TYPE_CHECKING, Any

from fake_hub.messages import Reply, Request, as_json
from fake_hub.routes import route, writable, writer
from fake_hub.store import BRANCH, LFS_PATTERNS, PULL_REQUEST, TAG, Blob, Commit, HubError, Repository, as_blob
from fake_hub.store import belongs_in_lfs as in_lfs

if TYPE_CHECKING:
    from fake_hub.server import HubServer


@dataclass
class Upload:
    """A large file that the storage expects."""

    repo: Repository
    oid: str
    size: int
    part_size: int | None  # None if it comes whole
    parts: dict[int, bytes] = field(default_factory=dict)

    def part_bytes(self, number: int) -> int:
        """The size of a part, in bytes."""
        return min(self.part_size or self.size, self.size - (number - 1) * (self.part_size or self.size))

    def finish(self, content: bytes) -> None:
        if len(content) != self.size or hashlib.sha256(content).hexdigest() != self.oid:
            raise HubError(400, "The content is not what was announced")
        self.repo.objects[self.oid] = content


# Repositories and refs


@route("POST", "/api/repos/create")
def create_repo(hub: HubServer, request: Request) -> Reply:
    user, body = writer(hub, request), request.json()
    owner = body.get("organization") or user.name
    kind = f"{body.get('type') or 'model'}s"
    if owner not in (user.name, *user.orgs):
        raise HubError(403, f"You don't have the rights to create a {kind[:-1]} under the namespace {owner}")
    repo = Repository(kind, f"{owner}/{body['name']}")
    result = {"name": repo.id, "id": repo.id, "url": f"{hub.endpoint}/{repo.web_path}"}
    if (kind, repo.id) in hub.repositories:
        return as_json({"error": f"You already created this {kind[:-1]} repo: {repo.id}", **result}, 409)
    repo.private = body.get("visibility") == "private" or bool(body.get("private"))
    attributes = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS)
    files = {".gitattributes": Blob(attributes.encode(), lfs=False)}
    repo.commit(BRANCH + "main", files, "initial commit", None, by=user.name)
    hub.repositories[kind, repo.id] = repo
    return as_json(result)


@route("DELETE", "/api/repos/delete")
def delete_repo(hub: HubServer, request: Request) -> Reply:
    user, body = writer(hub, request), request.json()
    name = f"{body.get('organization') or user.name}/{body['name']}"
    repo, _ = writable(hub, request, f"{body.get('type') or 'model'}s", name)
    del hub.repositories[repo.kind, repo.id]
    return as_json({})


@route("POST", "/api/{repo}/branch/{branch}")
def create_branch(hub: HubServer, request: Request, kind: str, id: str, branch: str) -> Reply:
    repo, _ = writable(hub, request, kind, id)
    commit = repo.resolve(request.json().get("startingPoint") or "main")
    return _create_ref(repo, BRANCH + branch, commit)


@route("POST", "/api/{repo}/tag/{revision}")
def create_tag(hub: HubServer, request: Request, kind: str, id: str, revision: str) -> Reply:
    repo, _ = writable(hub, request, kind, id)
    return _create_ref(repo, TAG + request.json()["tag"], repo.resolve(revision))


def _create_ref(repo: Repository, name: str, commit: Commit) -> Reply:
    if name in repo.refs:
        raise HubError(409, f"Reference already exists: {name}")
    repo.refs[name] = commit.sha
    return as_json({}, 201)


@route("DELETE", "/api/{repo}/branch/{branch}")
def delete_branch(hub: HubServer, request: Request, kind: str, id: str, branch: str) -> Reply:
    repo, _ = writable(hub, request, kind, id)
    if branch == "main":
        raise HubError(403, "The branch main is protected")
    if repo.refs.pop(BRANCH + branch, None) is None:
        raise HubError(404, f"Invalid rev id: {branch}", "RevisionNotFound")
    return as_json({})


@route("POST", "/api/{repo}/discussions")
def create_discussion(hub: HubServer, request: Request, kind: str, id: str) -> Reply:
    repo, user = writable(hub, request, kind, id, pull_request=True)
    body = request.json()
    number = repo.discuss(body["title"], user.name, body.get("description", ""), body["pullRequest"])
    if body["pullRequest"]:
        repo.refs[f"{PULL_REQUEST}{number}"] = repo.resolve("main").sha
    return as_json({"num": number})


# Large files


@route("POST", "/api/{repo}/preupload/{revision}")
def preupload(hub: HubServer, request: Request, kind: str, id: str, revision: str) -> Reply:
    """The upload mode of each file. `oid` is the file's present hash, so that the client can skip unchanged files."""
    repo, _ = writable(hub, request, kind, id, pull_request=request.flag("create_pr"))
    files = repo.resolve(revision).files
    entries = []
    for file in request.json()["files"]:
        path, sample = file["path"], base64.b64decode(file["sample"])
        each = {"path": path, "uploadMode": "lfs" if in_lfs(path, sample, file["size"]) else "regular"}
        each |= {"shouldIgnore": False} | ({"oid": files[path].etag} if path in files else {})
        entries.append(each)
    return as_json({"files": entries, "commitOid": repo.resolve(revision).sha})


@route("POST", "/{web}.git/info/lfs/objects/batch")
def lfs_batch(hub: HubServer, request: Request, kind: str | None, id: str) -> Reply:
    """The URLs to which to send the missing large files, whole or in parts."""
    repo, _ = writable(hub, request, kind, id)
    body = request.json()
    if "ref" in body:
        repo.resolve(body["ref"]["name"])
    objects = []
    for each in body["objects"]:
        oid, size = each["oid"], each["size"]
        objects.append({"oid": oid, "size": size})
        if repo.objects.get(oid) is None:
            in_parts = size > hub.multipart_size and "multipart" in body["transfers"]
            upload = Upload(repo, oid, size, hub.part_size if in_parts else None)
            objects[-1]["actions"] = _actions(hub, upload)
    transfer = "multipart" if any("chunk_size" in str(each) for each in objects) else "basic"
    return as_json({"transfer": transfer, "objects": objects}, headers={"Content-Type": "application/vnd.git-lfs+json"})


def _actions(hub: HubServer, upload: Upload) -> dict[str, Any]:
    key = f"{len(hub.uploads) + 1}-{upload.oid[:8]}"
    hub.uploads[key] = upload
    verify = {"href": f"{hub.endpoint}/{upload.repo.web_path}.git/info/lfs/objects/verify"}
    address = f"{hub.storage}/upload/{key}"
    if upload.part_size is None:
        return {"upload": {"href": f"{address}/1"}, "verify": verify}
    parts = {f"{part:05d}": f"{address}/{part}" for part in range(1, ceil(upload.size / upload.part_size) + 1)}
    header = {"chunk_size": str(upload.part_size), **parts}
    return {"upload": {"href": f"{hub.endpoint}/api/complete_multipart/{key}", "header": header}, "verify": verify}


@route("PUT", "/upload/{key}/{part}")
def put(hub: HubServer, request: Request, key: str, part: str) -> Reply:
    """Upload to the storage. Its addresses are signed: a token is rejected, and so is a body of unknown length."""
    if "Authorization" in request.headers:
        raise HubError(400, "Only one auth mechanism allowed")
    if "Content-Length" not in request.headers:
        raise HubError(501, "A header you provided implies functionality that is not implemented")
    upload, number = hub.uploads[key], int(part)
    if request.size != upload.part_bytes(number):
        raise HubError(400, f"Part {number} has {upload.part_bytes(number)} bytes, not {request.size}")
    if upload.part_size is None:
        upload.finish(request.body)
    upload.parts[number] = request.body
    return Reply(200, {"ETag": _etag(request.body)})


def _etag(part: bytes) -> str:
    return f'"{hashlib.md5(part).hexdigest()}"'


@route("POST", "/api/complete_multipart/{key}")
def complete(hub: HubServer, request: Request, key: str) -> Reply:
    upload, body = hub.uploads[key], request.json()
    parts = [{"partNumber": number, "etag": _etag(part)} for number, part in sorted(upload.parts.items())]
    if body["oid"] != upload.oid or body["parts"] != parts:
        raise HubError(400, "These are not the parts that came")
    upload.finish(b"".join(part for _, part in sorted(upload.parts.items())))
    return as_json({"success": True})


@route("POST", "/{web}.git/info/lfs/objects/verify")
def verify(hub: HubServer, request: Request, kind: str | None, id: str) -> Reply:
    repo, _ = writable(hub, request, kind, id)
    body = request.json()
    if len(repo.objects.get(body["oid"], b"")) != body["size"]:
        raise HubError(404, "No such object of that size")
    return as_json({})


# Commits


@route("POST", "/api/{repo}/commit/{revision}")
def commit(hub: HubServer, request: Request, kind: str, id: str, revision: str) -> Reply:
    """Apply a whole commit, or nothing."""
    as_pull_request = request.flag("create_pr")
    repo, user = writable(hub, request, kind, id, as_pull_request)
    header, *operations = _operations(request)
    ref, parent = _place(repo, revision, header.get("parentCommit"), as_pull_request)
    files = dict(parent.files)
    for name, value in operations:
        _change(repo, files, name, value)
    number = None
    if as_pull_request:
        number = repo.discuss(header["summary"], user.name, header["description"])
        ref = f"{PULL_REQUEST}{number}"
    new = repo.commit(ref, files, header["summary"], parent.sha, header["description"], user.name)
    address = f"{hub.endpoint}/{repo.web_path}"
    result = {"success": True, "commitOid": new.sha, "commitUrl": f"{address}/commit/{new.sha}", "hookOutput": ""}
    return as_json(result | ({"pullRequestUrl": f"{address}/discussions/{number}"} if number else {}))


def _operations(request: Request) -> list[Any]:
    """The header, and the operations as pairs of a name and its values."""
    lines = [json.loads(line) for line in request.body.splitlines() if line]
    if not lines or lines[0]["key"] != "header" or not lines[0]["value"].get("summary"):
        raise HubError(400, "A commit begins with a header that has a summary")
    return [{"description": "", **lines[0]["value"]}, *((line["key"], line["value"]) for line in lines[1:])]


def _place(repo: Repository, revision: str, parent: str | None, as_pull_request: bool) -> tuple[str, Commit]:
    """The ref to which a commit is added, and the commit before it."""
    head, ref = repo.resolve(revision), repo.ref(revision)
    if parent and as_pull_request:  # it may start from an old commit
        return "", repo.resolve(parent)
    if parent and not head.sha.startswith(parent):
        raise HubError(412, "A commit has happened since. Please refresh and try again.")
    if ref is None or ref.startswith(TAG):
        raise HubError(400, f"{revision} is no branch")
    return ref, head


def _change(repo: Repository, files: dict[str, Blob], name: str, value: dict[str, Any]) -> None:
    """Apply one operation to `files`."""
    path = value["path"]
    if name == "deletedFile":
        if files.pop(path, None) is None:
            raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
    elif name == "deletedFolder":
        below = [each for each in files if each.startswith(f"{path.rstrip('/')}/")]
        if not below:
            raise HubError(404, "A folder with this name doesn't exist", "EntryNotFound")
        for each in below:
            del files[each]
    elif name in ("file", "lfsFile"):
        _check_path(files, path)
        files[path] = _regular(value) if name == "file" else _large(repo, value)
    else:
        raise HubError(400, f"Unknown operation {name}")


def _check_path(files: dict[str, Blob], path: str) -> None:
    """Raise for a path that no git tree can have."""
    parts = path.split("/")
    if not all(parts) or {".", "..", ".git"} & set(parts):
        raise HubError(400, f"Invalid path: {path}")
    parents = {"/".join(parts[:length]) for length in range(1, len(parts))}
    if parents & set(files) or any(each.startswith(f"{path}/") for each in files):
        raise HubError(400, f"{path} is a file and a folder")


def _regular(value: dict[str, Any]) -> Blob:
    try:
        content = base64.b64decode(value["content"], validate=True)
    except binascii.Error as error:
        raise HubError(400, f"{value['path']} is not in base64") from error
    blob = as_blob(value["path"], content)
    if blob.lfs:
        raise HubError(400, f"{value['path']} belongs in large-file storage")
    return blob


def _large(repo: Repository, value: dict[str, Any]) -> Blob:
    """A large file, which must have been uploaded. Copied files come without a size."""
    content = repo.objects.get(value["oid"])
    if value["algo"] != "sha256" or content is None:
        raise HubError(400, f"The LFS pointer of {value['path']} points to a file that does not exist")
    if value.get("size", len(content)) != len(content):
        raise HubError(400, f"{value['path']} has {len(content)} bytes, not {value['size']}")
    return Blob(content, lfs=True)

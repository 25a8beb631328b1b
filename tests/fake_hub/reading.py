"""Requests that read: information about repositories, and their files."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, quote, urlencode

import yaml
from fake_hub.messages import Reply, Request, as_json
from fake_hub.routes import account, downloadable, readable, route, writable
from fake_hub.store import BRANCH, PULL_REQUEST, TAG, Blob, Commit, HubError, Repository

if TYPE_CHECKING:
    from fake_hub.server import HubServer

_MANY_PATHS = 1000  # limit of paths per request
_LICENSES = frozenset(  # some of the many that the Hub knows
    "apache-2.0 mit openrail bsd-3-clause cc-by-4.0 cc-by-sa-4.0 cc0-1.0 gemma gpl-3.0 llama3 llama3.1 llama3.2 "
    "llama3.3 llama4 other unknown".split()
)
_REPO_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@route("GET", "/api/whoami-v2")
def whoami(hub: HubServer, request: Request) -> Reply:
    user = account(hub, request)
    if user is None:
        raise HubError(401, "Invalid username or password.")
    token = {"displayName": "test", "role": user.role, "createdAt": "2026-01-01T00:00:00.000Z"}
    orgs = [{"type": "org", "name": name} for name in user.orgs]
    content = {"type": "user", "name": user.name, "orgs": orgs, "auth": {"type": "access_token", "accessToken": token}}
    return as_json(content)


@route("GET", "/api/agent-harnesses")
def agent_harnesses(hub: HubServer, request: Request) -> Reply:
    """The client requests this once a day."""
    return as_json({"standardEnvVars": [], "harnesses": {}})


@route("GET", "/api/{repo}/auth-check")
def may_read(hub: HubServer, request: Request, kind: str, id: str) -> Reply:
    downloadable(hub, request, kind, id)
    return as_json({})


@route("GET", "/api/{repo}/auth-check/write")
def may_write(hub: HubServer, request: Request, kind: str, id: str) -> Reply:
    writable(hub, request, kind, id)
    return as_json({})


@route("GET", "/api/{repo}")
def info(hub: HubServer, request: Request, kind: str, id: str) -> Reply:
    return revision_info(hub, request, kind, id, "main")


@route("GET", "/api/{repo}/revision/{revision}")
def revision_info(hub: HubServer, request: Request, kind: str, id: str, revision: str) -> Reply:
    repo = readable(hub, request, kind, id)
    commit = repo.resolve(revision)
    content: dict[str, Any] = {"id": id, "author": repo.owner, "sha": commit.sha, "private": repo.private, "tags": []}
    content |= {"gated": "manual" if repo.gated else False, "disabled": False, "downloads": 0, "likes": 0}
    content |= {"lastModified": commit.date, "createdAt": next(iter(repo.commits.values())).date}
    content["siblings"] = [_sibling(path, blob, request.flag("blobs")) for path, blob in sorted(commit.files.items())]
    card = commit.files.get("README.md")
    if card and isinstance(data := front_matter(card.content.decode(errors="replace")), dict):
        content["cardData"] = data
    return as_json(content)


def _sibling(path: str, blob: Blob, metadata: bool) -> dict[str, Any]:
    entry: dict[str, Any] = {"rfilename": path}
    if metadata:
        entry |= {"size": blob.size, "blobId": blob.oid}
        if blob.lfs:
            entry["lfs"] = {"sha256": blob.sha256, "size": blob.size, "pointerSize": len(blob.pointer)}
    return entry


@route("GET", "/api/{repo}/tree/{revision}")
def root(hub: HubServer, request: Request, kind: str, id: str, revision: str) -> Reply:
    return tree(hub, request, kind, id, revision, "")


@route("GET", "/api/{repo}/tree/{revision}/{path}")
def tree(hub: HubServer, request: Request, kind: str, id: str, revision: str, path: str) -> Reply:
    """A page of a folder's entries. The Link header has the address of the next page."""
    commit = readable(hub, request, kind, id).resolve(revision)
    entries = commit.tree(path.strip("/"), request.flag("recursive"))
    start = int(request.query.get("cursor", 0))
    end = start + hub.page_size
    headers = {"X-Repo-Commit": commit.sha}
    if end < len(entries):
        query = urlencode({**request.query, "cursor": end})
        headers["Link"] = f'<{hub.endpoint}{request.raw_path}?{query}>; rel="next"'
    return as_json(entries[start:end], headers=headers)


@route("POST", "/api/{repo}/paths-info/{revision}")
def paths_info(hub: HubServer, request: Request, kind: str, id: str, revision: str) -> Reply:
    """The entries of the paths that exist; the others are left out."""
    commit = readable(hub, request, kind, id).resolve(revision)
    requested = parse_qs(request.body.decode()).get("paths", [])
    if len(requested) > _MANY_PATHS:
        raise HubError(413, "too many parameters")
    return as_json([entry for entry in commit.tree("", recursive=True) if entry["path"] in requested])


@route("GET", "/api/{repo}/refs")
def refs(hub: HubServer, request: Request, kind: str, id: str) -> Reply:
    repo = readable(hub, request, kind, id)

    def below(start: str) -> list[dict[str, str]]:
        named = [(name, sha) for name, sha in repo.refs.items() if name.startswith(start)]
        return [{"name": name.removeprefix(start), "ref": name, "targetCommit": sha} for name, sha in named]

    content = {"branches": below(BRANCH), "tags": below(TAG), "converts": []}
    if request.flag("include_prs"):
        content["pullRequests"] = below(PULL_REQUEST)
    return as_json(content)


@route("GET", "/api/{repo}/commits/{revision}")
def commits(hub: HubServer, request: Request, kind: str, id: str, revision: str) -> Reply:
    """The commits, newest first."""
    repo = readable(hub, request, kind, id)
    history: list[Commit] = [repo.resolve(revision)]
    while history[-1].parent:
        history.append(repo.commits[history[-1].parent])
    return as_json(
        [
            {"id": c.sha, "title": c.message, "message": c.description, "date": c.date, "authors": [{"user": c.author}]}
            for c in history
        ]
    )


@route("GET", "/api/{repo}/discussions")
def discussions(hub: HubServer, request: Request, kind: str, id: str) -> Reply:
    all_of_them = readable(hub, request, kind, id).discussions
    return as_json({"count": len(all_of_them), "start": 0, "discussions": all_of_them})


@route("GET", "/api/{repo}/discussions/{number}")
def discussion(hub: HubServer, request: Request, kind: str, id: str, number: str) -> Reply:
    repo = readable(hub, request, kind, id)
    if not 0 < int(number) <= len(repo.discussions):
        raise HubError(404, "Discussion not found")
    more = {"events": [], "filesWithConflicts": [], "changes": {"base": BRANCH + "main"}, "diff": ""}
    return as_json(repo.discussions[int(number) - 1] | more)


@route("GET", "/{web}/resolve/{revision}/{path}")
def resolve(hub: HubServer, request: Request, kind: str | None, id: str, revision: str, path: str) -> Reply:
    """A file: its content if git has it, otherwise its address in the storage."""
    repo = downloadable(hub, request, kind, id)
    commit = repo.resolve(revision)
    blob = commit.files.get(path)
    if blob is None:
        raise HubError(404, "Entry not found", "EntryNotFound", {"X-Repo-Commit": commit.sha})
    headers = {"X-Repo-Commit": commit.sha, "ETag": f'"{blob.etag}"'}
    if not blob.lfs:
        return _content(request, repo, path, blob, headers)
    headers |= {"X-Linked-ETag": f'"{blob.etag}"', "X-Linked-Size": str(blob.size)}
    headers["Location"] = f"{hub.storage}/download/{repo.kind}/{id}/{blob.sha256}/{quote(path)}"
    return Reply(302, headers, b"Found. Redirecting to the storage")


@route("GET", "/download/{repo}/{sha256}/{path}")
def download(hub: HubServer, request: Request, kind: str, id: str, sha256: str, path: str) -> Reply:
    """A file from the storage. Its addresses are signed and work for anyone; requests with a token are rejected."""
    if "Authorization" in request.headers:
        raise HubError(400, "Only one auth mechanism allowed")
    repo = hub.repositories[kind, id]
    blob = Blob(repo.objects[sha256], lfs=True)
    return _content(request, repo, path, blob, {"ETag": f'"{sha256}"'})


def _content(request: Request, repo: Repository, path: str, blob: Blob, headers: dict[str, str]) -> Reply:
    """The whole file, or the requested range."""
    request.file = f"{repo.id}/{path}"
    headers |= {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("Range", ""))
    if match is None or match[0] == "bytes=-":
        return Reply(200, headers, blob.content)
    first = int(match[1]) if match[1] else max(blob.size - int(match[2]), 0)
    last = min(int(match[2]), blob.size - 1) if match[1] and match[2] else blob.size - 1
    if first > last:
        return Reply(416, {**headers, "Content-Range": f"bytes */{blob.size}"})
    headers["Content-Range"] = f"bytes {first}-{last}/{blob.size}"
    return Reply(206, headers, blob.content[first : last + 1])


def front_matter(card: str) -> Any:
    """The YAML at the top of a model card, or None."""
    match = re.match(r"\s*---\r?\n(.*?)\r?\n---(\r?\n|$)", card, re.DOTALL)
    return yaml.safe_load(match[1]) if match else None


@route("POST", "/api/validate-yaml")
def validate_yaml(hub: HubServer, request: Request) -> Reply:
    try:
        data = front_matter(request.json()["content"])
    except yaml.YAMLError as error:
        return as_json({"errors": [{"message": f"Invalid YAML: {error}"}], "warnings": []}, 400)
    if not data:
        return as_json({"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]})
    wrong = ["the metadata must be an object"] if not isinstance(data, dict) else list(_wrong_metadata(data))
    return as_json({"errors": [{"message": each} for each in wrong], "warnings": []}, 400 if wrong else 200)


def _wrong_metadata(data: dict[str, Any]) -> Iterator[str]:
    """The most common of the rules by which the Hub rejects a card."""

    def texts(name: str) -> list[Any]:
        value = data.get(name, [])
        return value if isinstance(value, list) else [value]

    if not set(map(str, texts("license"))) <= _LICENSES:
        yield f'"license" must be one of {", ".join(sorted(_LICENSES))}'
    if "tags" in data and not (isinstance(data["tags"], list) and all(isinstance(t, str) for t in data["tags"])):
        yield '"tags" must be an array of strings'
    for name in ("base_model", "datasets"):
        for value in texts(name):
            if not (isinstance(value, str) and _REPO_ID.fullmatch(value)):
                yield f'"{name}" with value "{value}" is not valid'

"""The function for each route, and the permissions of each user."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from fake_hub.messages import Reply, Request
from fake_hub.store import HubError, Repository

if TYPE_CHECKING:
    from fake_hub.server import HubServer

_PARTS = {
    "repo": r"(?P<kind>models|datasets|spaces)/(?P<id>[^/]+/[^/]+)",
    "web": r"(?:(?P<kind>datasets|spaces)/)?(?P<id>[^/]+/[^/]+)",
    "path": r"(?P<path>.+)",
}
_Route = Callable[..., Reply]
_routes: list[tuple[str, re.Pattern[str], _Route]] = []
STORAGE = ("/upload/", "/download/")  # answered by the storage, not by the Hub


@dataclass(frozen=True)
class Account:
    """The owner of a token and its permissions."""

    name: str
    role: str = "write"  # or only to read
    orgs: tuple[str, ...] = ()


def route(method: str, template: str) -> Callable[[_Route], _Route]:
    """Register a function for `method` at the paths of `template`, whose unquoted parts it gets."""
    pattern = re.sub(r"\{(\w+)\}", lambda part: _PARTS.get(part[1], rf"(?P<{part[1]}>[^/]+)"), template)

    def register(answer: _Route) -> _Route:
        _routes.append((method, re.compile(pattern), answer))
        return answer

    return register


def dispatch(hub: HubServer, request: Request) -> Reply:
    """The reply to a request. Unknown requests get status 501, which no client retries."""
    verb = "GET" if request.method == "HEAD" else request.method
    if request.storage == request.raw_path.startswith(STORAGE):
        for method, pattern, answer in _routes:
            if method == verb and (match := pattern.fullmatch(request.raw_path)):
                parts: dict[str, Any] = {name: value and unquote(value) for name, value in match.groupdict().items()}
                return answer(hub, request, **parts)
    raise HubError(501, f"This server has no {request.method} {request.raw_path}")


def account(hub: HubServer, request: Request) -> Account | None:
    """The account of a request; None without a token."""
    token = request.headers.get("Authorization", "").removeprefix("Bearer ")
    if token and token not in hub.tokens:
        raise HubError(401, "Invalid credentials in Authorization header")
    return hub.tokens.get(token)


def _belongs_to(repo: Repository, user: Account | None) -> bool:
    return user is not None and repo.owner in (user.name, *user.orgs)


def readable(hub: HubServer, request: Request, kind: str | None, name: str) -> Repository:
    """The repository, if the account may see that it exists."""
    user = account(hub, request)
    repo = hub.repositories.get((kind or "models", name))
    if repo is None or (repo.private and not _belongs_to(repo, user)):
        # The existence of a private repository is secret. The client recognises this 401 by its address, but only under
        # https; the error code makes it do the same here.
        status, message = (404, "Repository not found") if user else (401, "Invalid username or password.")
        raise HubError(status, message, "RepoNotFound")
    return repo


def downloadable(hub: HubServer, request: Request, kind: str | None, name: str) -> Repository:
    """The repository, if the account may download its files."""
    repo, user = readable(hub, request, kind, name), account(hub, request)
    if repo.gated and not _belongs_to(repo, user) and (user is None or user.name not in repo.granted):
        message = f"Access to {'model' if repo.kind == 'models' else 'dataset'} {repo.id} is restricted"
        raise HubError(403 if user else 401, message, "GatedRepo")
    return repo


def writer(hub: HubServer, request: Request) -> Account:
    """The account of a request, if it may write at all."""
    user = account(hub, request)
    if user is None:
        raise HubError(401, "Invalid username or password.")
    if user.role != "write":
        raise HubError(403, "Forbidden: this token may only read")
    return user


def writable(
    hub: HubServer, request: Request, kind: str | None, name: str, pull_request: bool = False
) -> tuple[Repository, Account]:
    """The repository and the account, if it may write. Anyone who can read it may open a pull request."""
    repo = readable(hub, request, kind, name)
    if account(hub, request) is None:
        raise HubError(401, "Invalid username or password.", "RepoNotFound")  # as in `readable`
    user = writer(hub, request)
    if not (pull_request or _belongs_to(repo, user)):
        raise HubError(403, "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request")
    return repo, user

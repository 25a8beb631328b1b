"""Translate errors of the Hub's client into what failed, why, and what to do next. They never contain a token."""

from __future__ import annotations

import re

from huggingface_hub import constants, get_token
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from deltamem_tool._compat import HTTPError, TimeoutException
from deltamem_tool.errors import HubError, first_line

# Errors of the client: its own; OSError, which replaces some answers; RuntimeError, which wraps errors of its threads;
# ValueError and KeyError for an answer that is not one of the Hub.
CLIENT_ERRORS = (HTTPError, HFValidationError, EntryNotFoundError, OSError, RuntimeError, ValueError, KeyError)
LOGIN = "Log in with `hf auth login`, or set HF_TOKEN."
_TOKEN = re.compile(r"hf_[A-Za-z0-9_]{4,}|(?<=Bearer )\S+")
_LATER = "Try again in a while."


def redact(text: str) -> str:
    """Remove everything from `text` that is, or looks like, a token of the Hub."""
    token = get_token()
    if token:
        text = text.replace(token, "***")
    return _TOKEN.sub("***", text)


def may_have_landed(error: BaseException) -> bool:
    """Return whether a commit that failed with `error` may exist, because it was sent and the Hub did not reject it."""
    for cause in _causes(error):
        if isinstance(cause, HTTPError):
            response = cause.response if isinstance(cause, HfHubHTTPError) else None
            request = cause.request if response is None else response.request
            return "/commit/" in request.url.path and (response is None or response.status_code >= 500)
    return isinstance(error, ValueError | KeyError)  # an answer that cannot be read, perhaps to the commit


def system_error(error: BaseException) -> OSError | None:
    """The error of the local system that caused `error`, such as a file that cannot be read; None if there is none."""
    for cause in _causes(error):
        if isinstance(cause, HTTPError):  # its causes are system errors about the connection
            return None
        if isinstance(cause, OSError) and cause.errno is not None:
            return cause
    return None


def hub_error(error: BaseException, repo_id: str, what: str, writing: bool = False) -> HubError:
    """Return the error to show to the user.

    Args:
        error: error of the client; its causes are considered too.
        repo_id: `owner/name`.
        what: sentence that says what failed.
        writing: whether the request was to change the repository.
    """
    causes = _causes(error)
    for kind, (why, after) in _BY_KIND.items():
        if any(isinstance(cause, kind) for cause in causes):
            return HubError(what, why, after.format(url=f"{constants.ENDPOINT}/{repo_id}"))
    for cause in causes:
        if isinstance(cause, HfHubHTTPError):
            return HubError(what, *_by_status(cause, repo_id, writing))
    if any(isinstance(cause, TimeoutException) for cause in causes):
        return HubError(what, "The Hub did not answer in time.", f"Check the network. {_LATER}")
    if any(isinstance(cause, HTTPError) for cause in causes):
        return HubError(
            what, f"The connection failed: {redact(first_line(causes[-1]))}.", f"Check the network. {_LATER}"
        )
    if isinstance(causes[-1], ValueError | KeyError):
        return HubError(what, "The response is not one of the Hub.", f"Check the network, and HF_ENDPOINT. {_LATER}")
    return HubError(what, f"{redact(first_line(error))}.", f"Check the network. {_LATER}")


def _causes(error: BaseException | None) -> list[BaseException]:
    """Yield `error` and its causes, outermost first."""
    causes: list[BaseException] = []
    while error is not None and error not in causes:
        causes.append(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return causes


# Checked in this order: GatedRepoError is a RepositoryNotFoundError.
_BY_KIND: dict[type[BaseException], tuple[str, str]] = {
    OfflineModeIsEnabled: (
        "HF_HUB_OFFLINE is set, and it is not in the local Hub cache.",
        "Unset HF_HUB_OFFLINE, or fetch it once while you are online.",
    ),
    GatedRepoError: ("It is gated, and your token has no access.", f"Ask for access at {{url}}. {LOGIN}"),
    RevisionNotFoundError: ("It has no such branch, tag or commit.", "The revisions are listed at {url}/tree/main."),
    RepositoryNotFoundError: (
        "There is no such repository on the Hub, or it is private and you have no access.",
        f"Check the name. {LOGIN}",
    ),
    HFValidationError: ("This is not a repository name.", "A name is OWNER/NAME, of letters, digits, -, _ and dots."),
}


def _by_status(error: HfHubHTTPError, repo_id: str, writing: bool) -> tuple[str, str]:
    """Return why the request failed and what to do next, by the status of the Hub's answer."""
    status = error.response.status_code
    lines = redact(error.server_message or "").strip().splitlines()
    words = f" It says: {lines[0].rstrip('.')}." if lines else ""
    if status in (401, 403) and not str(error.response.url).startswith(constants.ENDPOINT):
        return (
            f"The Hub's storage rejected the request ({status}).{words}",
            "Try again. The Hub's permissions for it expire, and require that the clock of this machine is right.",
        )
    if status == 401:
        return f"The token is missing, or the Hub does not accept it.{words}", LOGIN
    if status == 403:
        access = "write access to it (`hf auth login`), or propose a change with --create-pr"
        return (
            f"Your token does not have permission to do that with {repo_id}.{words}",
            f"Use a token with {access if writing else 'read access to it (`hf auth login`)'}.",
        )
    if status == 404:
        return f"The Hub cannot find it (404).{words}", "Check the name, and try again."
    if status in (409, 412):
        return f"It was changed in the meantime.{words}", "Check what has changed, and push again."
    if status == 413:
        return f"It is too large for the Hub.{words}", "Push a smaller folder, such as the adapter without the ONNX."
    if status == 429:
        wait = error.response.headers.get("Retry-After")
        after = f"Try again in {wait} s." if wait and wait.isdigit() else _LATER
        return f"The Hub received too many requests from you.{words}", after
    if status >= 500:
        return f"The Hub has an internal error ({status}).{words}", _LATER
    return f"The Hub answered {status}.{words or f' {redact(first_line(error))}.'}", "Correct it, and try again."

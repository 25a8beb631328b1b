"""A Hugging Face Hub on this machine, for tests: the real client cannot tell it from the real one."""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fake_hub import reading, writing  # noqa: F401  (their routes)
from fake_hub.faults import Fault, Faults
from fake_hub.messages import Match, Reply, Request, as_json
from fake_hub.routes import Account, dispatch
from fake_hub.store import BRANCH, HubError, Repository, as_blob
from fake_hub.writing import Upload

TOKENS = {"hf_write": Account("someone"), "hf_read": Account("someone", "read"), "hf_other": Account("another")}


class HubServer:
    """A Hub that runs until its context ends.

    Large files have another address, as on the real Hub, to which no token is sent.

    Args:
        tokens: the account of each token.
        seed: for the bytes at which faults cut a connection.
        multipart_size: larger files are uploaded in parts.
        part_size: bytes of a part.
        page_size: entries on a page of a tree.
    """

    def __init__(
        self,
        tokens: Mapping[str, Account] = TOKENS,
        *,
        seed: int = 0,
        multipart_size: int = 1 << 20,
        part_size: int = 1 << 19,
        page_size: int = 1000,
    ) -> None:
        self.tokens = dict(tokens)
        self.multipart_size, self.part_size, self.page_size = multipart_size, part_size, page_size
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.uploads: dict[str, Upload] = {}
        self.requests: list[Request] = []
        self.faults = Faults(seed)
        self.errors: list[BaseException] = []  # errors of the server itself
        # Filled by the fixture `hub`: seconds for which the client would have slept, hosts that it could not resolve.
        self.waits: list[float] = []
        self.sought: list[str] = []
        self.closing = threading.Event()
        self._lock = threading.RLock()

    def __enter__(self) -> Self:
        self._listeners = [_Listener(self, storage=False), _Listener(self, storage=True)]
        self.endpoint, self.storage = (f"http://127.0.0.1:{each.server_port}" for each in self._listeners)
        for each in self._listeners:
            threading.Thread(target=each.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        self.closing.set()
        for each in self._listeners:
            each.shutdown()
            each.server_close()
        if kind is None and self.errors:
            raise self.errors[0]

    # Set up and inspected by tests

    def add_repo(
        self,
        repo_id: str,
        files: Mapping[str, bytes] | Path,
        *,
        repo_type: str = "model",
        branch: str = "main",
        private: bool = False,
        gated: bool = False,
        granted: tuple[str, ...] = (),
    ) -> str:
        """Commit exactly `files` to a branch, and create what is missing. Returns the commit's id."""
        if isinstance(files, Path):
            below = [path for path in files.rglob("*") if path.is_file()]
            files = {path.relative_to(files).as_posix(): path.read_bytes() for path in below}
        with self._lock:
            new = Repository(f"{repo_type}s", repo_id, private, gated, frozenset(granted))
            repo = self.repositories.setdefault((new.kind, repo_id), new)
            blobs = {path: as_blob(path, content) for path, content in files.items()}
            parent = repo.refs.get(BRANCH + branch) or repo.refs.get(BRANCH + "main")
            return repo.commit(BRANCH + branch, blobs, "Seed", parent, by=repo.owner).sha

    def repo(self, repo_id: str, repo_type: str = "model") -> Repository:
        return self.repositories[f"{repo_type}s", repo_id]

    def head(self, repo_id: str, branch: str = "main", repo_type: str = "model") -> str:
        """The commit that a revision names."""
        with self._lock:
            return self.repo(repo_id, repo_type).resolve(branch).sha

    def files_at(self, repo_id: str, revision: str = "main", repo_type: str = "model") -> dict[str, bytes]:
        with self._lock:
            files = self.repo(repo_id, repo_type).resolve(revision).files
            return {path: blob.content for path, blob in files.items()}

    def asked(self, match: Match = "") -> list[Request]:
        """The requests that match, as in `Request.matches`."""
        return [request for request in list(self.requests) if request.matches(match)]

    def fetched(self) -> list[str]:
        """`owner/name/path` of every file whose content was requested."""
        return [request.file for request in self.asked("^GET ") if request.file]

    def fail(self, match: Match, how: Fault, times: int | None = 1) -> None:
        """Make the next `times` matching requests fail, or all of them if `times` is None."""
        self.faults.add(match, how, times)

    def answer(self, request: Request) -> Reply:
        """Answer requests sequentially, so that no one sees half a commit."""
        with self._lock:
            try:
                return dispatch(self, request)
            except HubError as error:
                headers = {"X-Error-Message": error.message, **error.headers}
                if error.code:
                    headers["X-Error-Code"] = error.code
                return as_json({"error": error.message}, error.status, headers)


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, hub: HubServer, storage: bool) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub, self.storage = hub, storage

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that disconnect. Any other error is the server's own, and the test reports it."""
        error = sys.exc_info()[1]
        if error is not None and not isinstance(error, ConnectionError):
            self.hub.errors.append(error)


class _Handler(BaseHTTPRequestHandler):
    """The HTTP part. Every connection serves one request, so that none is open when the server ends."""

    protocol_version = "HTTP/1.1"
    server: _Listener

    def log_message(self, *args: Any) -> None:
        pass

    def handle_request(self) -> None:
        self.close_connection = True
        hub = self.server.hub
        request = Request(self.command, self.path, self.headers, self.server.storage)
        hub.requests.append(request)
        fault = hub.faults.take(request)
        if fault.delay:
            hub.closing.wait(fault.delay)
        size = int(self.headers.get("Content-Length", 0))
        if fault.cut_request is not None:
            request.cut_at = size = hub.faults.byte(fault.cut_request, size)
        request.body = self._chunks() if self._is_chunked() else self.rfile.read(size)
        if fault.cut_request is None:
            self._send(request, fault.reply or hub.answer(request), fault)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request

    def _is_chunked(self) -> bool:
        return self.headers.get("Transfer-Encoding", "").lower() == "chunked"

    def _chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _send(self, request: Request, reply: Reply, fault: Fault) -> None:
        if fault.unanswered:
            return
        if fault.garbled:
            reply = Reply(200, {"Content-Type": "text/html"}, b"<html>Please accept our terms</html>")
        body = b"" if request.method == "HEAD" else reply.body
        if fault.cut_answer is not None:
            request.cut_at = self.server.hub.faults.byte(fault.cut_answer, len(body))
            body = body[: request.cut_at]
        request.status = reply.status
        self.send_response(reply.status)
        for name, value in {**reply.headers, "Content-Length": str(len(reply.body)), "Connection": "close"}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

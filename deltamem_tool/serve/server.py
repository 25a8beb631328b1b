"""Run the application on uvicorn."""

from __future__ import annotations

import asyncio
import ipaddress
import socket

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from deltamem_tool.errors import ConfigError, first_line
from deltamem_tool.serve.header_limit import MAX_HEADER_BYTES

DRAIN_SECONDS = 60  # for requests in progress when the server shuts down
HEAD_SECONDS = 30.0  # time limit for receiving the request line and the headers
DEAF_SECONDS = 60.0  # a client that receives nothing of an answer for so long is disconnected


def check_host(host: str, has_keys: bool, no_keys: bool) -> None:
    """Check that a server without keys can only be reached from this machine, unless `no_keys` allows more.

    Raises:
        ConfigError: other machines could reach it.
    """
    if has_keys or no_keys or _is_loopback(host):
        return
    raise ConfigError(
        f"A server at {host} would answer anybody.",
        "It is not a loopback address, and there are no API keys.",
        "Create a key with --new-key and pass --api-keys FILE, or --no-keys behind a proxy that authenticates users.",
    )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to the address.

    Raises:
        ConfigError: the address does not belong to this machine, or is in use.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if hasattr(socket, "TCP_USER_TIMEOUT"):  # on Linux, where accepted connections inherit it
                listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(DEAF_SECONDS * 1000))
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"The server cannot listen on {host}:{port}.", f"{first_line(error)}.", "Choose another --host or --port."
        ) from error
    return listener


class HttpProtocol(H11Protocol):
    """An h11 connection with bounded headers, closed if a request's headers do not arrive in time."""

    _overdue: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the first request."""
        super().connection_made(transport)
        self._expect()

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        self._expect()  # first, because the next request begins at once if the client has already sent it
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel the timeout."""
        super().connection_lost(exc)
        if self._overdue is not None:
            self._overdue.cancel()

    def _expect(self) -> None:
        if self._overdue is not None:
            self._overdue.cancel()
        self._overdue = self.loop.call_later(HEAD_SECONDS, self._check, self.cycle)

    def _check(self, last: object) -> None:
        if self.cycle is last and not self.transport.is_closing():  # uvicorn has closed an idle connection by now
            self.transport.abort()


def config_of(app: Starlette) -> uvicorn.Config:
    """Return the configuration of uvicorn for the application."""
    return uvicorn.Config(
        app,
        http=HttpProtocol,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_graceful_shutdown=DRAIN_SECONDS,
    )


def run(app: Starlette, listener: socket.socket) -> None:
    """Serve until SIGTERM or SIGINT, then wait for the requests in progress."""
    uvicorn.Server(config_of(app)).run(sockets=[listener])

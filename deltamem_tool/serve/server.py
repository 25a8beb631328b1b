"""The application on uvicorn."""

from __future__ import annotations

import ipaddress
import socket

import uvicorn
from starlette.applications import Starlette

from deltamem_tool.errors import ConfigError, first_line

MAX_HEADER_BYTES = 32 * 2**10
DRAIN_SECONDS = 60  # for requests that are being answered when the server is told to end


def check_host(host: str, has_keys: bool, no_keys: bool) -> None:
    """Check that nobody but this machine can use a server without keys, unless that is wanted.

    Raises:
        ConfigError: others could.
    """
    if has_keys or no_keys or _is_loopback(host):
        return
    raise ConfigError(
        f"A server at {host} would answer anybody.",
        "It is not a loopback address, and there are no API keys.",
        "Make a key with --new-key and pass --api-keys FILE, or --no-keys if a proxy before it knows its users.",
    )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that can listen there.

    Raises:
        ConfigError: the address is not this machine's, or is in use.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"The server cannot listen at {host}:{port}.", f"{first_line(error)}.", "Choose another --host or --port."
        ) from error
    return listener


def config_of(app: Starlette) -> uvicorn.Config:
    """Return how uvicorn serves the application."""
    return uvicorn.Config(
        app,
        http="h11",  # whose headers are bounded
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_graceful_shutdown=DRAIN_SECONDS,
    )


def run(app: Starlette, listener: socket.socket) -> None:
    """Serve until SIGTERM or SIGINT, and then until every request that was begun is answered."""
    uvicorn.Server(config_of(app)).run(sockets=[listener])

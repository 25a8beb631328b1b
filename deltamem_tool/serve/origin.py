"""Refuse requests that a browser sends for pages of other origins, on a server without keys."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from deltamem_tool.serve.errors import RequestError, error_response


class SameOriginOnly:
    """Middleware that refuses requests from pages of other origins.

    A server without keys answers everyone on its machine, including every page open in a browser there. A browser names
    the origin of the page in `Origin`. If a page's name was made to resolve to this machine (DNS rebinding), that name
    is in `Host`, which is then neither an address nor localhost.

    Args:
        app: application that answers all other requests.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 403."""
        if scope["type"] != "http" or _is_same_origin(Headers(scope=scope)):
            await self._app(scope, receive, send)
            return
        refused = RequestError(
            "The request comes from a page of another site.",
            "This server has no API keys, so it answers only programs and its own page.",
            "Use its own page, or start it with --api-keys, or with --no-keys behind a proxy that authenticates users.",
            status=403,
        )
        await error_response(refused)(scope, receive, send)


def _is_same_origin(headers: Headers) -> bool:
    host, origin = headers.get("host", ""), headers.get("origin")
    return _is_address(host) and (origin is None or _host_of(origin) == host)


def _host_of(origin: str) -> str | None:
    """Host and port of an origin; None if it is not one."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return None


def _is_address(host: str) -> bool:
    """Whether `host` is localhost or an IP address, with or without a port."""
    try:
        name = urlsplit(f"//{host}").hostname
        return name == "localhost" or bool(ipaddress.ip_address(name or ""))
    except ValueError:
        return False

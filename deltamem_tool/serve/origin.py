"""A server without keys answers its own machine, and so every page in a browser there: pages of others are refused."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from deltamem_tool.serve.errors import RequestError, error_response


class OwnPagesOnly:
    """Middleware that refuses what a browser sends for a page of another origin.

    A browser says in `Origin` whose page it sends something for. A page whose own name was made to lead to this
    machine (DNS rebinding) has that name in `Host`, which is then neither an address nor localhost.

    Args:
        app: what answers the other requests.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 403."""
        if scope["type"] != "http" or _is_own(Headers(scope=scope)):
            await self._app(scope, receive, send)
            return
        refused = RequestError(
            "The request comes from another site's page.",
            "This server has no keys, and answers programs and its own page alone.",
            "Use its own page, or start it with --api-keys; --no-keys if a proxy before it knows its users.",
            status=403,
        )
        await error_response(refused)(scope, receive, send)


def _is_own(headers: Headers) -> bool:
    host, origin = headers.get("host", ""), headers.get("origin")
    return _is_address(host) and (origin is None or urlsplit(origin).netloc == host)


def _is_address(host: str) -> bool:
    """Whether it is localhost or an IP address, with a port or without."""
    try:
        name = urlsplit(f"//{host}").hostname
        return name == "localhost" or bool(ipaddress.ip_address(name or ""))
    except ValueError:
        return False

"""Bound the headers of a request."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from deltamem_tool.serve.errors import RequestError, error_response

MAX_HEADER_BYTES = 32 * 2**10


class HeaderLimit:
    """Middleware that refuses requests with more than `MAX_HEADER_BYTES` of headers.

    The connection bounds what it keeps of headers that are incomplete; those that come at once pass it.

    Args:
        app: application that answers all other requests.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 431."""
        size = sum(len(name) + len(value) for name, value in scope.get("headers", ()))
        if scope["type"] != "http" or size <= MAX_HEADER_BYTES:
            await self._app(scope, receive, send)
            return
        refused = RequestError(
            "The headers are too large.", f"At most {MAX_HEADER_BYTES} bytes are accepted.", "Send less.", status=431
        )
        await error_response(refused)(scope, receive, send)

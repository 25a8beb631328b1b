"""The page at `/`: a chat, with its memory beside it. It uses only the public API.

Its files are in `page/`. Files that it shares with the page of `deltamem page` are served next to them.
"""

from __future__ import annotations

import mimetypes
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from deltamem_tool.io import web_files

FOLDER = Path(__file__).with_name("page")
# Forbids resources of other origins, inline scripts, and text that is turned into HTML.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
mimetypes.add_type("text/javascript", ".js")  # Windows may have another type, which browsers refuse to run


class _Files(StaticFiles):
    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(HEADERS)
        return response


def page_routes() -> list[Route]:
    """Return the routes of the page and of its files, which need no key."""
    files = _Files(directory=FOLDER)
    files.all_directories += [web_files.PARTS, web_files.library()]

    async def page(request: Request) -> Response:
        return await files.get_response("index.html", request.scope)

    async def part(request: Request) -> Response:
        return await files.get_response(request.path_params["name"], request.scope)

    return [Route("/", page, methods=["GET"]), Route("/page/{name}", part, methods=["GET"])]

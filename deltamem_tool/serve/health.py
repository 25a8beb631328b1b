"""The endpoints `/health` (the process is alive), `/ready` (it can answer) and `/metrics`."""

from __future__ import annotations

from anyio.to_thread import run_sync
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from deltamem_tool.errors import DeltaMemError
from deltamem_tool.serve.errors import error_response
from deltamem_tool.serve.service import service_of


async def health(request: Request) -> JSONResponse:
    """`GET /health`."""
    return JSONResponse({"status": "ok"})


async def ready(request: Request) -> JSONResponse:
    """`GET /ready`: whether the store can be reached."""
    try:
        await run_sync(service_of(request).store.ping)
    except DeltaMemError as error:
        return error_response(error)
    return JSONResponse({"status": "ready"})


async def metrics(request: Request) -> Response:
    """`GET /metrics`, in Prometheus' format."""
    counted = service_of(request).metrics
    return Response(counted.text(), headers={"Content-Type": counted.content_type})

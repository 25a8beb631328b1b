"""The endpoint `/v1/models`, which lists the one model that is served."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse

from deltamem_tool.serve.service import Service, service_of


async def list_models(request: Request) -> JSONResponse:
    """`GET /v1/models`."""
    service = service_of(request)
    service.tenant_of(request)
    return JSONResponse({"object": "list", "data": [_model(service)]})


async def get_model(request: Request) -> JSONResponse:
    """`GET /v1/models/{model}`."""
    service = service_of(request)
    service.tenant_of(request)
    service.check_model(request.path_params["model"])
    return JSONResponse(_model(service))


def _model(service: Service) -> dict[str, Any]:
    return {
        "id": service.model,
        "object": "model",
        "created": service.created,
        "owned_by": "deltamem",
        "adapter": service.scheduler.engine.adapter,
        "context_window": service.turns.window,
    }

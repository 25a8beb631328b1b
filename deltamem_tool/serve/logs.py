"""Logs on stderr, one JSON object per line. They contain no message text and no names of memories."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any

from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deltamem_tool.serve.metrics import Metrics

LOGGER = logging.getLogger("deltamem.serve")


class JsonFormatter(logging.Formatter):
    """Formats a record as JSON. The entries of its `fields` are added at the top level."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        line: dict[str, Any] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def log_as_json() -> None:
    """Send the server's log, and uvicorn's, to stderr as JSON."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    for name in (LOGGER.name, "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(logging.INFO)
        logger.propagate = False


class RequestLog:
    """Middleware that logs each request when it has ended.

    Args:
        app: the application that answers the requests.
        metrics: also counts the requests.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, and log it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, began = 500, time.perf_counter()  # 500 unless a response is started

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            seconds = time.perf_counter() - began
            path = _pattern(scope)
            self._metrics.count_request(scope["method"], path, status, seconds)
            fields = {"method": scope["method"], "path": path, "status": status, "seconds": round(seconds, 4)}
            LOGGER.info("request", extra={"fields": fields})


def _pattern(scope: Scope) -> str:
    """The route's pattern: the path itself may name a memory."""
    routes = scope["app"].routes
    return next((route.path for route in routes if route.matches(scope)[0] is not Match.NONE), "unknown")

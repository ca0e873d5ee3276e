"""Logging and metrics of every request."""

from __future__ import annotations

import logging
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .metrics import Metrics

log = logging.getLogger(__name__)


class Observed:
    """Counts and logs every request with endpoint, status, size of the picture and duration, but no ids or names."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.perf_counter(), 500
        state = scope.setdefault("state", {})

        async def read() -> Message:
            message = await receive()
            state["body_read"] = not message.get("more_body", False)
            return message

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-content-type-options", b"nosniff")]
            await send(message)

        try:
            await self._app(scope, read, watch)
        finally:
            endpoint = getattr(scope.get("route"), "path", "other")
            self._metrics.requests.labels(endpoint, str(status)).inc()
            size = state.get("upload_bytes", 0)
            milliseconds = 1e3 * (time.perf_counter() - start)
            log.info("%s %s %d, %d bytes, %.0f ms", scope["method"], endpoint, status, size, milliseconds)

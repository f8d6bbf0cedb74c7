"""What is left of a client's limits, in the head of every answer, streams and errors included."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from softprompt.server.clients.client import Client
from softprompt.server.clients.limiter import Limiter

App = Callable[[Any, Any, Any], Awaitable[None]]

_KEY = "softprompt.rate_headers"  # in a request's scope


def count_request(scope: MutableMapping[str, Any], limiter: Limiter, client: Client) -> None:  # Any: as ASGI has it
    """Count a request, and note its headers for RateHeaders. Raises ApiError 429."""
    try:
        limiter.request(client)
    finally:
        scope.get(_KEY, {}).update(limiter.headers(client))


class RateHeaders:
    """ASGI middleware that writes the headers which count_request has noted."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        noted: dict[str, str] = {}

        async def send_with_headers(message: Any) -> None:
            if noted and message["type"] == "http.response.start":
                lines = ((name.encode(), value.encode()) for name, value in noted.items())
                message = {**message, "headers": [*message.get("headers", ()), *lines]}
            await send(message)

        scope[_KEY] = noted  # not in a copy: the layers outside of this one read the route from the same scope
        await self._app(scope, receive, send_with_headers)

"""How much a client may send, and how slowly."""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import anyio

from softprompt.config import ServerConfig
from softprompt.server.errors import ApiError
from softprompt.server.running.notes import Scope, header_of

Message = dict[str, Any]  # Any: as ASGI has it
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]
App = Callable[[Any, Receive, Send], Awaitable[None]]

_UPLOADS = ("/v1/files", "/v1/prompts")
_FORM_BYTES = 2**16  # what a form needs beside its file
_SLOWEST = 16 * 2**10  # bytes per second, in the long run
_LINGER_S = 5.0  # for a client that goes on sending what was refused: it then reads the answer


class BodyLimits:
    """ASGI middleware: a body that is too large is refused with 413, one that comes too slowly with 408."""

    def __init__(self, app: App, config: ServerConfig) -> None:
        self._app = app
        self._config = config

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = _Body(receive, self._limit(scope["path"]), self._config.client_timeout_s)
        if _announced(scope) > body.limit:
            await refuse(body.too_large(), send, receive, body.limit)
            return
        answer = _Answer(send, body)
        try:
            await self._app(scope, body.receive, answer.send)
        except Exception:
            if body.refusal is None:
                raise
        if body.refusal is not None and not answer.has_begun:
            is_slow = body.refusal.status == 408
            await refuse(body.refusal, send, receive, 0 if is_slow else body.limit)

    def _limit(self, path: str) -> int:
        if any(path == place or path.startswith(f"{place}/") for place in _UPLOADS):
            return self._config.max_upload_bytes + _FORM_BYTES
        return self._config.max_body_bytes


class RefusedBodyError(Exception):
    """Ends the reading of a body; what the client is told stands in `_Body.refusal`."""


class _Body:
    """`receive`, counted and timed until the body's end."""

    def __init__(self, receive: Receive, limit: int, patience_s: float) -> None:
        self.limit = limit
        self.refusal: ApiError | None = None
        self._receive = receive
        self._patience_s = patience_s
        self._num_bytes = 0
        self._is_whole = False
        self._began = time.monotonic()

    async def receive(self) -> Message:
        if self._is_whole:
            found: Message = await self._receive()
            return found
        message = await self._next()
        self._num_bytes += len(message.get("body", b""))
        self._is_whole = not message.get("more_body", False)
        if self._num_bytes > self.limit:
            raise self._refused(self.too_large())
        return message

    def too_large(self) -> ApiError:
        why = f"the request's body is larger than {self.limit} bytes, the most that is taken here; send less at once"
        return ApiError(413, why, "body_too_large")

    async def _next(self) -> Message:
        """The next piece. Its time is the patience, and what the pieces so far may take at the slowest pace."""
        allowed = self._patience_s + self._num_bytes / _SLOWEST
        message: Message | None = None
        with anyio.move_on_after(self._began + allowed - time.monotonic()):
            message = await self._receive()
        if message is None:
            why = f"{self._num_bytes} bytes of the request's body came in {allowed:.0f} s; send it faster"
            raise self._refused(ApiError(408, why, "body_too_slow"))
        return message

    def _refused(self, refusal: ApiError) -> RefusedBodyError:
        self.refusal = refusal
        return RefusedBodyError(refusal.message)


class _Answer:
    """`send`, which drops what a route makes of a body that was refused."""

    def __init__(self, send: Send, body: _Body) -> None:
        self.has_begun = False
        self._send = send
        self._body = body

    async def send(self, message: Message) -> None:
        if self._body.refusal is None or self.has_begun:
            self.has_begun = True
            await self._send(message)


async def refuse(error: ApiError, send: Send, receive: Receive | None = None, most_bytes: int = 0) -> None:
    """Tell an error and close the connection.

    With `receive`, first take and drop up to `most_bytes` that the client still sends: whoever writes into a closed
    connection never reads the answer.
    """
    content = json.dumps(error.envelope()).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode()),
               (b"connection", b"close")]  # fmt: skip
    if error.retry_after_s is not None:
        headers.append((b"retry-after", str(max(1, round(error.retry_after_s))).encode()))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": content, "more_body": True})
    if receive is not None and most_bytes > 0:
        await _drop(receive, most_bytes)
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _drop(receive: Receive, most_bytes: int) -> None:
    with anyio.move_on_after(_LINGER_S):
        while most_bytes > 0:
            message = await receive()
            most_bytes -= len(message.get("body", b""))
            if not message.get("more_body", False):
                return


def _announced(scope: Mapping[str, Any]) -> int:
    """Bytes that Content-Length promises; 0 where it says nothing."""
    found = header_of(scope, b"content-length")
    return int(found) if found is not None and found.isdigit() else 0

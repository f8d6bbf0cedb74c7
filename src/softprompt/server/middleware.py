"""The outermost layer of the app: every request gets an id, a line in the log, its figures and, if asked for, a span.

It also answers what nobody else does: 503 while the server drains, 500 where a route broke, and the last words of a
stream that is cut off.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import nullcontext
from typing import Any
from urllib.parse import urlsplit

import anyio
from fastapi import FastAPI

from softprompt.config import ServerConfig
from softprompt.errors import shortened
from softprompt.server.clients.auth import asks_for_keys, client_of, is_loopback
from softprompt.server.clients.rate_limits import RateHeaders
from softprompt.server.dependencies import dependency_of
from softprompt.server.errors import ApiError
from softprompt.server.lifecycle import Lifecycle, stopping
from softprompt.server.telemetry.metrics import Metrics
from softprompt.server.telemetry.request_log import RequestLog, Scope, header_of, request_id, route_of
from softprompt.server.telemetry.tracing import Tracing

_log = logging.getLogger("softprompt.server.requests")

_OPERATORS = frozenset({"/health", "/ready", "/metrics"})  # asked every few seconds, and while the server drains
_LEFT = 499  # the client hung up before there was a status
_MOST_TEXT = 16 * 2**10  # bytes of a body that go into the log, where texts do


def observe(app: FastAPI) -> None:
    """Put this layer, and below it the limits of bodies, around an app that has the parts they need."""
    config = dependency_of(app, ServerConfig)
    app.add_middleware(RateHeaders)
    if not asks_for_keys(config):
        app.add_middleware(OriginCheck)
    app.add_middleware(BodyLimits, config=config)
    app.add_middleware(
        RequestMiddleware, config=config, lifecycle=dependency_of(app, Lifecycle), metrics=dependency_of(app, Metrics),
        tracing=dependency_of(app, Tracing),
    )  # fmt: skip


class RequestMiddleware:
    """ASGI middleware, see above. It knows no route."""

    def __init__(
        self, app: App, *, config: ServerConfig, lifecycle: Lifecycle, metrics: Metrics, tracing: Tracing
    ) -> None:
        self._app = app
        self._logs_texts = config.log_texts
        self._lifecycle = lifecycle
        self._metrics = metrics
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        notes = RequestLog.begin(scope)
        heard = _Heard(receive) if self._logs_texts else None
        answer = _Answer(send, notes.id, keeps_text=self._logs_texts)
        token = request_id.set(notes.id)
        is_operators = scope["path"] in _OPERATORS
        try:
            with nullcontext() if is_operators else self._tracing.span(scope, notes, answer):
                await self._answer(scope, heard.receive if heard else receive, answer, is_operators)
        finally:
            self._tell(scope, notes, answer, heard, is_operators)
            request_id.reset(token)

    async def _answer(self, scope: Scope, receive: Receive, answer: _Answer, is_operators: bool) -> None:
        if self._lifecycle.is_draining and not is_operators:
            await refuse(stopping(), answer.send)
            return
        try:
            with nullcontext() if is_operators else self._lifecycle.running(scope):
                await self._app(scope, receive, answer.send)
        except asyncio.CancelledError:
            why = self._lifecycle.why_cut_off()
            if why is None:
                raise
            await answer.cut_off(why)
        except Exception:
            _log.exception("a request failed")
            await answer.cut_off(ApiError(500, "the server has failed; its log says why"))

    def _tell(self, scope: Scope, notes: RequestLog, answer: _Answer, heard: _Heard | None, is_operators: bool) -> None:
        route, seconds = route_of(scope), notes.duration_s
        self._metrics.answered(route, notes.method, answer.status, seconds)
        if is_operators or not _log.isEnabledFor(logging.INFO):
            return
        fields: dict[str, Any] = {  # Any: JSON
            "method": notes.method, "route": route, "status": answer.status, "duration_ms": round(seconds * 1e3, 1),
            "client": client_of(scope), "model": notes.model, "prompt_tokens": notes.num_prompt_tokens,
            "completion_tokens": notes.num_new_tokens,
        }  # fmt: skip
        if heard is not None:
            fields |= {"request_body": _shown(heard.text), "response_body": _shown(answer.text)}
        _log.info("request", extra={"fields": fields})


class _Answer:
    """`send` with the request's id among the headers. Remembers what has been said so far."""

    def __init__(self, send: Send, id: str, *, keeps_text: bool) -> None:
        self.status = _LEFT
        self.text = bytearray()
        self._send = send
        self._header = (b"x-request-id", id.encode())
        self._keeps_text = keeps_text
        self._has_begun = self._has_ended = self._is_stream = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._begin(message)
        else:
            self._has_ended = not message.get("more_body", False)
            if self._keeps_text and len(self.text) < _MOST_TEXT:
                self.text += message.get("body", b"")
        await self._send(message)

    async def cut_off(self, why: ApiError) -> None:
        """The answer's end as well as it can still be told; a stream's last event is the error."""
        if not self._has_begun:
            await refuse(why, self.send)
        elif self._is_stream and not self._has_ended:
            body = b"data: " + json.dumps(why.envelope()).encode() + b"\n\n"
            await self.send({"type": "http.response.body", "body": body, "more_body": False})

    def _begin(self, message: Message) -> None:
        self._has_begun, self.status = True, message["status"]
        headers = [(name.lower(), value) for name, value in message.get("headers", ())]
        self._is_stream = any(
            name == b"content-type" and value.startswith(b"text/event-stream") for name, value in headers
        )
        message["headers"] = [*(item for item in headers if item[0] != b"x-request-id"), self._header]


class _Heard:
    """`receive`, with the body's beginning kept for the log."""

    def __init__(self, receive: Receive) -> None:
        self.text = bytearray()
        self._receive = receive

    async def receive(self) -> Message:
        message: Message = await self._receive()
        if len(self.text) < _MOST_TEXT:
            self.text += message.get("body", b"")
        return message


def _shown(body: bytearray) -> str:
    return bytes(body[:_MOST_TEXT]).decode("utf-8", "replace")


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
        answer = _UnlessRefused(send, body)
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


class _UnlessRefused:
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


class OriginCheck:
    """ASGI middleware for a server without keys: refuses what a web page of somebody else makes a browser send.

    Such a page can post to the loopback by its address (its Origin tells), or have its own name resolve to it (DNS
    rebinding; then the Host is not ours). Programs send neither.
    """

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        refusal = _refusal(scope) if scope["type"] in ("http", "websocket") else None
        if refusal is None:
            await self._app(scope, receive, send)
        else:
            await _refuse_foreign(refusal, scope["type"], send)


def _refusal(scope: Scope) -> ApiError | None:
    hosts, origins = _headers(scope, b"host"), _headers(scope, b"origin")
    foreign = next((host for host in hosts if not is_loopback(_name(host))), None)
    if foreign is not None:
        return ApiError(403, f"the Host is {shortened(foreign)}; without API keys this server answers to loopback "
                             "names alone: use 127.0.0.1, or start it with --require-keys", "foreign_host")  # fmt: skip
    other = next((origin for origin in origins if not _is_own(origin, hosts)), None)
    if other is not None:
        return ApiError(403, f"the Origin is {shortened(other)}; without API keys this server takes nothing from other "
                             "web pages: start it with --require-keys", "foreign_origin")  # fmt: skip
    return None


def _headers(scope: Scope, name: bytes) -> list[str]:
    return [value.decode("latin-1") for key, value in scope["headers"] if key == name]


def _name(host: str) -> str:
    """A Host header's name, its port cut off; empty where it cannot be read."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _is_own(origin: str, hosts: list[str]) -> bool:
    scheme, _, place = origin.partition("://")
    return scheme in ("http", "https") and place.lower() in [host.lower() for host in hosts]


async def _refuse_foreign(error: ApiError, kind: str, send: Any) -> None:
    if kind == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    content = json.dumps(error.envelope()).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": content})

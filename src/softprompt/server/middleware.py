"""What surrounds every route: one ASGI middleware, the outermost layer of the app.

Each request gets an id, a line in the log, its metrics and, where traces are on, a span. Without the route being
called it refuses other web pages (403, where no keys are asked for), bodies that are too large (413) or come too slowly
(408), and every request while the server drains (503). A route that fails is answered with 500; a stream that is cut
off ends with the error as its last event.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from contextlib import nullcontext

import anyio
from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from softprompt.config import ServerConfig
from softprompt.server.clients.auth import asks_for_keys, foreign_page
from softprompt.server.clients.rate_limits import rate_limit_headers
from softprompt.server.dependencies import dependency_of
from softprompt.server.errors import ApiError, error_response
from softprompt.server.lifecycle import Lifecycle, stopping
from softprompt.server.telemetry.metrics import Metrics
from softprompt.server.telemetry.request_log import RequestLog, request_id, route_of
from softprompt.server.telemetry.tracing import Tracing

_log = logging.getLogger("softprompt.server.requests")

_PROBES = frozenset({"/health", "/ready", "/metrics"})  # asked for every few seconds, and while the server drains
_LOGGED_BYTES = 16 * 2**10  # of a body, where bodies are logged
_UPLOADS = ("/v1/files", "/v1/prompts")
_FORM_BYTES = 2**16  # of a form, beside its file
_MIN_BYTES_PER_S = 16 * 2**10  # of a body, in the long run
_LINGER_S = 5.0  # for a client that still sends a refused body: only then does it read the answer


def add_middleware(app: FastAPI) -> None:
    """Surround an app that has the shared objects which this layer uses."""
    app.add_middleware(
        RequestMiddleware, config=dependency_of(app, ServerConfig), lifecycle=dependency_of(app, Lifecycle),
        metrics=dependency_of(app, Metrics), tracing=dependency_of(app, Tracing),
    )  # fmt: skip


class RequestMiddleware:
    """See above. It knows no route."""

    def __init__(
        self, app: ASGIApp, *, config: ServerConfig, lifecycle: Lifecycle, metrics: Metrics, tracing: Tracing
    ) -> None:
        self._app = app
        self._config = config
        self._has_keys = asks_for_keys(config)
        self._lifecycle = lifecycle
        self._metrics = metrics
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        log = RequestLog.begin(scope)
        body = _Body(receive, self._max_bytes(scope["path"]), self._config)
        response = _Response(send, scope, log, body)
        token = request_id.set(log.id)
        is_probe = scope["path"] in _PROBES
        try:
            with nullcontext() if is_probe else self._tracing.span(scope, log):
                await self._respond(scope, body, response, is_probe)
        finally:
            self._metrics.answered(route_of(scope), log.method, log.status, log.duration_s)
            if not is_probe and _log.isEnabledFor(logging.INFO):
                fields = log.fields(scope)
                if self._config.log_texts:
                    fields |= {"request_body": _shown(body.text), "response_body": _shown(response.text)}
                _log.info("request", extra={"fields": fields})
            request_id.reset(token)

    async def _respond(self, scope: Scope, body: _Body, response: _Response, is_probe: bool) -> None:
        if self._lifecycle.is_draining and not is_probe:
            await response.refuse(stopping())
            return
        try:
            with nullcontext() if is_probe else self._lifecycle.running(scope):
                await self._call_app(scope, body, response)
        except asyncio.CancelledError:
            reason = self._lifecycle.why_cut_off()
            if reason is None:
                raise
            await response.cut_off(reason)
        except Exception:
            _log.exception("a request failed")
            await response.cut_off(ApiError(500, "the server has failed; its log says why"))

    async def _call_app(self, scope: Scope, body: _Body, response: _Response) -> None:
        headers = Headers(scope=scope)
        if not body.check_announced(headers):
            await response.refuse_body()
        elif not self._has_keys and (foreign := foreign_page(headers)) is not None:
            await response.refuse(foreign)
        else:
            try:
                await self._app(scope, body.receive, response.send)
            except Exception:
                if body.refusal is None:
                    raise
            if body.refusal is not None and not response.has_begun:
                await response.refuse_body()

    def _max_bytes(self, path: str) -> int:
        is_upload = any(path == each or path.startswith(f"{each}/") for each in _UPLOADS)
        return self._config.max_upload_bytes + _FORM_BYTES if is_upload else self._config.max_body_bytes


class RefusedBodyError(Exception):
    """Ends the reading of a body; `_Body.refusal` is the error for the client."""


class _Body:
    """A request's body: `receive`, counted and timed until its end, its beginning kept where bodies are logged."""

    def __init__(self, receive: Receive, max_bytes: int, config: ServerConfig) -> None:
        self.refusal: ApiError | None = None
        self.text = bytearray()
        self._receive = receive
        self._max_bytes = max_bytes
        self._timeout_s = config.client_timeout_s
        self.is_logged = config.log_texts
        self._num_bytes = 0
        self._is_whole = False
        self._began = time.monotonic()

    def check_announced(self, headers: Headers) -> bool:
        """Whether Content-Length is within the limit; if not, the body is refused."""
        announced = headers.get("content-length", "")
        if announced.isascii() and announced.isdigit() and int(announced[:20]) > self._max_bytes:
            self._refuse_size()
        return self.refusal is None

    async def receive(self) -> Message:
        """The next message. Raises RefusedBodyError for a body that is too large or too slow."""
        if self._is_whole:
            return await self._receive()
        message = await self._next()
        piece = message.get("body", b"")
        self._num_bytes += len(piece)
        if self.is_logged and len(self.text) < _LOGGED_BYTES:
            self.text += piece
        self._is_whole = not message.get("more_body", False)
        if self._num_bytes > self._max_bytes:
            raise self._refuse_size()
        return message

    async def drop(self) -> None:
        """Discard what the client still sends of a body that is too large, up to the limit and for a short time."""
        if self.refusal is None or self.refusal.status != 413:
            return
        num_left = self._max_bytes
        with anyio.move_on_after(_LINGER_S):
            while num_left > 0:
                message = await self._receive()
                num_left -= len(message.get("body", b""))
                if not message.get("more_body", False):
                    return

    async def _next(self) -> Message:
        """The next message, within the client's timeout and what the bytes so far may take at the slowest pace."""
        allowed_s = self._timeout_s + self._num_bytes / _MIN_BYTES_PER_S
        with anyio.move_on_after(self._began + allowed_s - time.monotonic()):
            return await self._receive()
        reason = f"{self._num_bytes} bytes of the request's body came in {allowed_s:.0f} s; send it faster"
        raise self._refuse(ApiError(408, reason, "body_too_slow"))

    def _refuse_size(self) -> RefusedBodyError:
        reason = f"the request's body is larger than {self._max_bytes} bytes, the most that is taken; send less at once"
        return self._refuse(ApiError(413, reason, "body_too_large"))

    def _refuse(self, refusal: ApiError) -> RefusedBodyError:
        self.refusal = refusal
        return RefusedBodyError(refusal.message)


class _Response:
    """`send` of one request: adds the headers that every answer has, and knows how far the answer has come."""

    def __init__(self, send: Send, scope: Scope, log: RequestLog, body: _Body) -> None:
        self.has_begun = False
        self.text = bytearray()
        self._send = send
        self._scope = scope
        self._log = log
        self._body = body
        self._is_stream = self._has_ended = False

    async def send(self, message: Message) -> None:
        """Send the app's next message; its answer to a body that was refused is dropped."""
        if self.has_begun or self._body.refusal is None:
            await self._forward(message)

    async def refuse_body(self) -> None:
        """Answer with the body's refusal."""
        if self._body.refusal is not None:
            await self.refuse(self._body.refusal)

    async def refuse(self, error: ApiError) -> None:
        """Answer with an error and close the connection.

        The rest of a body that is too large is read first: a client that writes into a closed connection never reads
        the answer.
        """

        async def send_open(message: Message) -> None:
            await self._forward({**message, "more_body": True} if message["type"] == "http.response.body" else message)

        response = error_response(error)
        response.headers["connection"] = "close"
        await response(self._scope, self._body.receive, send_open)
        await self._body.drop()
        await self._forward({"type": "http.response.body", "body": b""})

    async def cut_off(self, error: ApiError) -> None:
        """End the answer with an error, as well as that still can be done: as a stream's last event, say."""
        if not self.has_begun:
            await self.refuse(error)
        elif self._is_stream and not self._has_ended:
            event = b"data: " + json.dumps(error.envelope()).encode() + b"\n\n"
            await self._forward({"type": "http.response.body", "body": event})

    async def _forward(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._begin(message)
        else:
            self._has_ended = not message.get("more_body", False)
            if self._body.is_logged and len(self.text) < _LOGGED_BYTES:
                self.text += message.get("body", b"")
        await self._send(message)

    def _begin(self, message: Message) -> None:
        self.has_begun, self._log.status = True, message["status"]
        headers = MutableHeaders(scope=message)
        headers["x-request-id"] = self._log.id
        headers.update(rate_limit_headers(self._scope))
        self._is_stream = headers.get("content-type", "").startswith("text/event-stream")


def _shown(text: bytearray) -> str:
    return bytes(text[:_LOGGED_BYTES]).decode("utf-8", "replace")

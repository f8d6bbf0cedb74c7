"""The outermost layer of the app: every request gets an id, a line in the log, its figures and, if asked for, a span.

It also answers what nobody else does: 503 while the server drains, 500 where a route broke, and the last words of a
stream that is cut off.
"""

from __future__ import annotations

import asyncio
import json
import logging
from contextlib import nullcontext
from typing import Any

from fastapi import FastAPI

from softprompt.config import ServerConfig
from softprompt.server.errors import ApiError
from softprompt.server.parts import part_of
from softprompt.server.running.lifecycle import Lifecycle, stopping
from softprompt.server.running.limits import App, BodyLimits, Message, Receive, Send, refuse
from softprompt.server.running.logs import request_id
from softprompt.server.running.metrics import Metrics
from softprompt.server.running.notes import Notes, Scope, client_of, route_of
from softprompt.server.running.tracing import Tracing

_log = logging.getLogger("softprompt.server.requests")

_OPERATORS = frozenset({"/health", "/ready", "/metrics"})  # asked every few seconds, and while the server drains
_LEFT = 499  # the client hung up before there was a status
_MOST_TEXT = 16 * 2**10  # bytes of a body that go into the log, where texts do


def observe(app: FastAPI) -> None:
    """Put this layer, and below it the limits of bodies, around an app that has the parts they need."""
    config = part_of(app, ServerConfig)
    app.add_middleware(BodyLimits, config=config)
    app.add_middleware(Observing, config=config, lifecycle=part_of(app, Lifecycle), metrics=part_of(app, Metrics),
                       tracing=part_of(app, Tracing))  # fmt: skip


class Observing:
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
        notes = Notes.begin(scope)
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

    def _tell(self, scope: Scope, notes: Notes, answer: _Answer, heard: _Heard | None, is_operators: bool) -> None:
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

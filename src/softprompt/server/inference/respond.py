"""A generation as its HTTP response: one body, or a stream of server-sent events. A client that disconnects ends it."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import Request, Response
from fastapi.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from softprompt.engine import PromptLogprobs, TokenLogProb, Tokens
from softprompt.errors import SoftpromptError
from softprompt.server.errors import ApiError
from softprompt.server.inference.format import AnswerFormat
from softprompt.server.inference.generation import Generation, GenerationEvent
from softprompt.server.inference.logprobs import Json

Events = AsyncGenerator[tuple[int, GenerationEvent], None]
Result = TypeVar("Result")

_log = logging.getLogger(__name__)
_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
_CLIENT_CLOSED_REQUEST = 499  # nobody reads it
_READING = 2  # reading a stream may take this many times the generation timeout
_DONE = b"data: [DONE]\n\n"


class ClientDisconnectedError(Exception):
    """Nobody waits for the response any more."""


async def respond(http: Request, generation: Generation, format: AnswerFormat) -> Response:
    """The response. Raises what `Generation.events` raises, as long as nothing was sent."""
    events = generation.events()
    try:
        if generation.output.is_stream:
            first = await unless_disconnected(http.receive, anext(events))
            return EventStream(generation, format, first, events)
        return JSONResponse(await unless_disconnected(http.receive, _whole(events, format)))
    except ClientDisconnectedError:
        await events.aclose()
        return Response(status_code=_CLIENT_CLOSED_REQUEST)
    except BaseException:
        await events.aclose()
        raise


async def _whole(events: Events, format: AnswerFormat) -> Json:
    log_probs: dict[int, list[TokenLogProb]] = defaultdict(list)
    choices: list[Json] = []
    async with aclosing(events):
        async for number, event in events:
            if isinstance(event, Tokens):
                log_probs[format.index(number, event.choice)] += event.generated_log_probs
            elif isinstance(event, PromptLogprobs):
                format.add_prompt_logprobs(number, event)
            else:
                for choice, answer in enumerate(event.answers):
                    index = format.index(number, choice)
                    choices.append(format.choice(index, answer, log_probs.pop(index, [])))
    return format.answer(sorted(choices, key=lambda choice: int(choice["index"])))


class EventStream(Response):
    """Server-sent events of a generation, which is closed when the client disconnects, and in any case at the end.

    An error after the first event is an event too: the status has been sent.
    """

    media_type = "text/event-stream"

    def __init__(
        self, generation: Generation, format: AnswerFormat, first: tuple[int, GenerationEvent], events: Events
    ) -> None:
        super().__init__(headers=_HEADERS)
        del self.headers["content-length"]
        self._generation = generation
        self._format = format
        self._first = first
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_disconnected(receive, self._send(send))
        except ClientDisconnectedError:
            pass
        finally:
            await self._events.aclose()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            await self._send_chunks(send, self._format.chunks(*self._first))
            async for number, event in self._events:
                if chunks := self._format.chunks(number, event):
                    await self._send_chunks(send, chunks)
                    self._check_pace()
            last = self._format.last_chunks()
        except Exception as error:
            last = [_as_api_error(error).envelope()]
        await send({"type": "http.response.body", "body": _as_events(last) + _DONE, "more_body": False})

    async def _send_chunks(self, send: Send, chunks: Sequence[Json]) -> None:
        await send({"type": "http.response.body", "body": _as_events(chunks), "more_body": True})

    def _check_pace(self) -> None:
        """Raises ApiError 408 if the client reads so slowly that what was generated piles up in memory."""
        limit_s = self._generation.requests[0].timeout_s
        if limit_s is not None and time.perf_counter() - self._generation.began > _READING * limit_s:
            raise ApiError(408, f"the answer was read more slowly than in {_READING * limit_s:g} s; read it faster",
                           "read_too_slowly")  # fmt: skip


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of the work. Raises ClientDisconnectedError, with the work cancelled, if the client disconnects first.

    `receive` is the request's ASGI channel after its body.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnectedError
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _as_events(chunks: Sequence[Json]) -> bytes:
    return b"".join(b"data: %s\n\n" % json.dumps(chunk, separators=(",", ":")).encode() for chunk in chunks)


def _as_api_error(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, SoftpromptError):
        return ApiError.of(error)
    _log.error("a stream failed", exc_info=error)
    return ApiError(500, "the server has failed; its log says why")

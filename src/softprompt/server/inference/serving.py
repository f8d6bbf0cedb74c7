"""From a call to its HTTP answer: one body, or a stream of server-sent events."""

from __future__ import annotations

import json
import logging
import time
from collections import defaultdict
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from softprompt.engine import AsyncEngine, PromptLogprobs, TokenLogProb, Tokens
from softprompt.errors import SoftpromptError
from softprompt.server.errors import ApiError
from softprompt.server.inference.accounting import admit, ended
from softprompt.server.inference.answering import answering
from softprompt.server.inference.call import Call, Told
from softprompt.server.inference.counting import Counting
from softprompt.server.inference.hanging_up import ClientLeftError, EventStream, unless_gone
from softprompt.server.inference.shape import Json, Writer
from softprompt.server.telemetry.request_log import RequestLog

_log = logging.getLogger(__name__)
_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
_LEFT = 499  # nobody reads it
_READING = 2  # times as long as an answer may take may its reading take
_DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Asked:
    """One HTTP request that asks for answers."""

    http: Request
    engine: AsyncEngine
    notes: RequestLog
    is_stream: bool


async def respond(asked: Asked, call: Call, writer: Writer) -> Response:
    """The answer. Raises what `answering` raises, as long as nothing was sent."""
    told = _accounted(asked, call)
    try:
        if asked.is_stream:
            first = await unless_gone(asked.http.receive, anext(told))
            return EventStream(_stream(first, told, writer), headers=_HEADERS)
        return JSONResponse(await unless_gone(asked.http.receive, _whole(told, writer)))
    except ClientLeftError:
        await told.aclose()
        return Response(status_code=_LEFT)
    except BaseException:
        await told.aclose()
        raise


async def _accounted(asked: Asked, call: Call) -> AsyncGenerator[Told, None]:
    """What is told, between the beginning and the end of the account."""
    admit(asked.http, call)
    call.outcome = "left"
    told = answering(asked.engine, call)
    counting = Counting(asked.http, call)
    try:
        async with aclosing(told):
            async for each in told:
                counting.take(each)
                yield each
        call.outcome = "answered"
    except Exception as error:
        call.outcome = "refused" if isinstance(error, SoftpromptError) else "failed"  # the engine's own refuse to begin
        raise
    finally:
        counting.end(call)
        ended(asked.http, call, asked.notes)


async def _whole(told: AsyncGenerator[Told, None], writer: Writer) -> Json:
    reports: dict[int, list[TokenLogProb]] = defaultdict(list)
    choices: list[Json] = []
    async with aclosing(told):
        async for number, event in told:
            if isinstance(event, Tokens):
                reports[writer.index(number, event.choice)] += event.generated_log_probs
                continue
            if isinstance(event, PromptLogprobs):
                writer.read(number, event)
                continue
            for choice, answer in enumerate(event.answers):
                index = writer.index(number, choice)
                choices.append(writer.choice(index, answer, reports.pop(index, [])))
    return writer.answer(sorted(choices, key=lambda choice: int(choice["index"])))


async def _stream(first: Told, told: AsyncGenerator[Told, None], writer: Writer) -> AsyncGenerator[bytes, None]:
    """Events as bytes. An error behind the first is an event too: the status has been sent."""
    async with aclosing(told):
        try:
            yield _events(_chunks(first, writer))
            async for each in told:
                if chunks := _chunks(each, writer):
                    yield _events(chunks)
                    _check_pace(writer.call)
            yield _events(writer.closing()) + _DONE
        except Exception as error:
            yield _events([_as_told(error).envelope()]) + _DONE


def _check_pace(call: Call) -> None:
    """What was generated waits in memory for whoever reads it. Raises ApiError 408 where that takes too long."""
    limit_s = call.requests[0].timeout_s
    if limit_s is not None and time.perf_counter() - call.began > _READING * limit_s:
        raise ApiError(408, f"the answer was read more slowly than in {_READING * limit_s:g} s; read it faster",
                       "read_too_slowly")  # fmt: skip


def _chunks(told: Told, writer: Writer) -> list[Json]:
    number, event = told
    if isinstance(event, Tokens):
        index = writer.index(number, event.choice)
        return writer.tokens(index, event) + (writer.end(index, event.end) if event.end is not None else [])
    if isinstance(event, PromptLogprobs):
        writer.read(number, event)
        return writer.openings(number)
    return []  # each choice has told its own end


def _events(chunks: list[Json]) -> bytes:
    return b"".join(b"data: %s\n\n" % json.dumps(chunk, separators=(",", ":")).encode() for chunk in chunks)


def _as_told(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, SoftpromptError):
        return ApiError.of(error)
    _log.error("a stream failed", exc_info=error)
    return ApiError(500, "the server has failed; its log says why")

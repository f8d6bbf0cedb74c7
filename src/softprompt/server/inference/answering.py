"""Runs a call's requests, all at once, and gives what they tell in the order in which it comes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from softprompt.engine import Aborted, AsyncEngine, Event, Failed, Finished, Request
from softprompt.errors import SoftpromptError
from softprompt.server.errors import ApiError
from softprompt.server.inference.call import Call, Told, What

_STOPPING_RETRY_S = 5.0


async def answering(engine: AsyncEngine, call: Call) -> AsyncGenerator[Told, None]:
    """Tokens as they come, and one Finished of each request. Whoever closes it gives all of them up.

    Nothing comes before the engine has taken every request. Raises what `AsyncEngine.generate` raises, and ApiError
    408, 500 or 503 where a request ends without an answer.
    """
    alone = len(call.requests) == 1
    told = _events(engine, call.requests[0]) if alone else _side_by_side(engine, call.requests)
    async with aclosing(told):
        async for number, event in told:
            call.take(event)
            yield number, event


async def _events(engine: AsyncEngine, request: Request) -> AsyncGenerator[Told, None]:
    async with aclosing(engine.generate(request)) as events:
        async for event in events:
            yield 0, _sound(event, request)


async def _side_by_side(engine: AsyncEngine, requests: tuple[Request, ...]) -> AsyncGenerator[Told, None]:
    told: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
    readers = [_Reader(engine, number, request, told) for number, request in enumerate(requests)]
    try:
        await asyncio.gather(*(reader.admitted for reader in readers))
        num_left = len(readers)
        while num_left:
            number, event = await told.get()
            sound = _sound(event, requests[number])
            num_left -= isinstance(sound, Finished)
            yield number, sound
    finally:
        for reader in readers:
            reader.task.cancel()
        await asyncio.gather(*(reader.task for reader in readers), return_exceptions=True)


class _Reader:
    """A task that puts what one of several requests tells into a queue."""

    def __init__(
        self, engine: AsyncEngine, number: int, request: Request, told: asyncio.Queue[tuple[int, Event]]
    ) -> None:
        self.admitted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.task = asyncio.create_task(self._read(engine, number, request, told))

    async def _read(
        self, engine: AsyncEngine, number: int, request: Request, told: asyncio.Queue[tuple[int, Event]]
    ) -> None:
        try:
            async with aclosing(engine.generate(request, self._take)) as events:
                async for event in events:
                    told.put_nowait((number, event))
        except SoftpromptError as error:  # raised before it was admitted, never behind that
            if not self.admitted.done():
                self.admitted.set_exception(error)

    def _take(self) -> None:
        if not self.admitted.done():
            self.admitted.set_result(None)


def _sound(event: Event, request: Request) -> What:
    if isinstance(event, Failed) and event.is_request_fault:
        raise ApiError(400, event.why, "invalid_value", "response_format")
    if isinstance(event, Failed):
        raise ApiError(500, f"the answer could not be generated: {event.why}", "generation_failed")
    if isinstance(event, Aborted):
        if event.reason == "deadline":
            why = f"the answer took longer than {request.timeout_s:g} s, waiting included; ask for fewer tokens"
            raise ApiError(408, why, "timeout")
        raise ApiError(503, "the server is being stopped; try again soon", "stopping", retry_after_s=_STOPPING_RETRY_S)
    return event

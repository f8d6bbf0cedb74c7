"""An engine for coroutines: one worker thread owns it; all others send it commands and receive events.

Any number of event loops may share one AsyncEngine. A loop is woken at most once per step for all of its requests.
Every admitted request ends in exactly one terminal event, also when the engine fails or is closed.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from types import TracebackType
from typing import TypeVar

from softprompt.compute_share import ComputeShare
from softprompt.engine.engine import Engine
from softprompt.engine.pooling import PoolingRequest
from softprompt.engine.request import Event, Failed, Request, Terminal
from softprompt.engine.stats import EngineStats
from softprompt.errors import EngineError
from softprompt.prompt import SoftPrompt

_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")


@dataclass(eq=False)
class _Consumer:
    """One call of `generate_all` or `pool`: its event loop, and the requests whose events it still expects."""

    loop: asyncio.AbstractEventLoop
    events: asyncio.Queue[tuple[int, Event]] = field(default_factory=asyncio.Queue)
    index_of: dict[int, int] = field(default_factory=dict)  # by id; the worker's own


_Delivery = tuple[_Consumer, tuple[int, Event]]


class AsyncEngine:
    """`async with AsyncEngine(engine) as running: async for event in running.generate(request): ...`

    From `start` on only the worker thread may touch the engine.
    """

    def __init__(self, engine: Engine, compute_share: ComputeShare | None = None) -> None:
        """`compute_share`: shared with a training that runs in another thread on the same base."""
        self._engine = engine
        self._compute_share = compute_share or ComputeShare()
        self._commands: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._is_open = False
        self._gate = threading.Lock()  # for `_is_open`: no command may come after the last one is taken
        # only the worker uses these
        self._consumers: dict[int, _Consumer] = {}
        self._is_closing = False
        self._error: Exception | None = None

    def start(self) -> None:
        """Start the worker. Raises EngineError if it was started before."""
        if self._thread is not None:
            raise EngineError("the engine was started before; make a new one")
        self._thread = threading.Thread(target=self._work, name="softprompt-engine", daemon=True)
        self._is_open = True
        self._thread.start()

    async def close(self, drain: bool = False) -> None:
        """Take no more requests, and return when the worker has ended.

        Running requests are aborted; with `drain` they are answered first.
        """
        with suppress(EngineError):  # not open: never started, or closed by another
            self._ask(partial(self._begin_to_close, drain))
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)

    async def __aenter__(self) -> AsyncEngine:
        self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def weights(self) -> str:
        """`EngineConfig.weights`."""
        return self._engine.config.weights

    @property
    def notes(self) -> tuple[str, ...]:
        """`Engine.notes`."""
        return self._engine.notes

    def check(self, request: Request) -> None:
        """See `Engine.check`; needs no running engine and never waits."""
        self._engine.check(request)

    def check_pooling(self, request: PoolingRequest) -> None:
        """See `Engine.check_pooling`; needs no running engine and never waits."""
        self._engine.check_pooling(request)

    async def generate(
        self, request: Request, on_admitted: Callable[[], None] | None = None
    ) -> AsyncGenerator[Event, None]:
        """Its tokens as they come, then exactly one Finished, Aborted or Failed. `on_admitted` is called before them.

        Closing the generator (break, `aclose`, a cancelled task) aborts the request. Raises what `Engine.add` raises,
        and EngineError where the engine has stopped.
        """
        async with aclosing(self.generate_all([request], on_admitted)) as events:
            async for _, event in events:
                yield event

    async def generate_all(
        self, requests: Sequence[Request], on_admitted: Callable[[], None] | None = None
    ) -> AsyncGenerator[tuple[int, Event], None]:
        """(index, event) of all requests as they come, until each has ended. All are admitted at once, or none.

        Closing the generator aborts those that have not ended. Raises as `generate` does.
        """
        for request in requests:
            if request.sampling is not None and request.sampling.is_guided:
                await asyncio.to_thread(self._engine.prepare, request)  # the worker compiles nothing
        adds = [partial(self._engine.add, request) for request in requests]
        async with aclosing(self._events(adds, on_admitted)) as events:
            async for pair in events:
                yield pair

    async def pool(self, requests: Sequence[PoolingRequest]) -> list[Terminal]:
        """The end of each: Pooled, Aborted or Failed. All are admitted at once, or none; a cancelled call aborts them.

        Raises what `Engine.add_pooling` raises, and EngineError where the engine has stopped.
        """
        ends: dict[int, Terminal] = {}
        adds = [partial(self._engine.add_pooling, request) for request in requests]
        async with aclosing(self._events(adds)) as events:
            async for index, event in events:
                assert isinstance(event, Terminal), event
                ends[index] = event
        return [ends[index] for index in range(len(requests))]

    async def _events(
        self, adds: Sequence[Callable[[], int]], on_admitted: Callable[[], None] | None = None
    ) -> AsyncGenerator[tuple[int, Event], None]:
        """(index, event) of the requests that the engine admits by these calls, until each has ended."""
        consumer, num_left = _Consumer(asyncio.get_running_loop()), len(adds)
        admitted = self._ask(partial(self._admit, adds, consumer))
        try:
            await asyncio.wrap_future(admitted)
            if on_admitted is not None:
                on_admitted()
            while num_left:
                index, event = await consumer.events.get()
                num_left -= isinstance(event, Terminal)
                yield index, event
        finally:
            if num_left:
                with suppress(EngineError):  # closed in the meantime
                    self._ask(partial(self._abort_all, consumer))

    async def abort(self, request: int) -> None:
        """End a request: Aborted is its last event. Does nothing for one that has ended, or never was."""
        with suppress(EngineError):  # where the engine has stopped, all have ended
            await asyncio.wrap_future(self._ask(partial(self._engine.abort, request)))

    async def pin(self, prompt: SoftPrompt) -> None:
        """See `Engine.pin`. Raises MemoryLimitError, and EngineError where the engine is closed."""
        await asyncio.wrap_future(self._ask(partial(self._engine.pin, prompt)))

    async def unpin(self, prompt: SoftPrompt) -> None:
        """See `Engine.unpin`."""
        with suppress(EngineError):  # where the engine has stopped, nothing is kept
            await asyncio.wrap_future(self._ask(partial(self._engine.unpin, prompt)))

    @property
    def is_working(self) -> bool:
        """Whether it takes requests: it was started, is not being closed, and no step has failed. Never waits."""
        has_thread = self._thread is not None and self._thread.is_alive()
        return self._is_open and has_thread and self._error is None and not self._is_closing

    async def stats(self) -> EngineStats:
        """Figures as they stand between two steps. Raises EngineError where the engine is closed."""
        return await asyncio.wrap_future(self._ask(self._engine.stats))

    def _ask(self, command: Callable[[], _Result]) -> Future[_Result]:
        """The worker calls it between two steps."""
        answer: Future[_Result] = Future()
        with self._gate:
            if not self._is_open:
                raise EngineError("the engine is not running; use it inside `async with`")
            self._commands.put(partial(_call, command, answer))
        return answer

    # From here on: in the worker's thread

    def _work(self) -> None:
        try:
            while self._has_work or not self._is_closing:
                self._take_commands()
                if self._has_work:
                    self._deliver(self._step())
        finally:
            self._end()

    @property
    def _has_work(self) -> bool:
        return self._error is None and self._engine.has_work

    def _take_commands(self) -> None:
        """Run all commands that are there; without other work, wait for one."""
        if not self._has_work:
            self._compute_share.idle()
        for _ in range(max(self._commands.qsize(), 0 if self._has_work else 1)):
            self._commands.get()()

    def _step(self) -> list[Event]:
        try:
            with self._compute_share.inference_step():
                return self._engine.step()
        except Exception as error:
            _log.exception("the engine's step failed; it has stopped")
            self._error = error.with_traceback(None)  # its frames hold tensors
            return self._failed(f"the engine has stopped: {type(error).__name__}: {error}")

    def _deliver(self, events: Iterable[Event]) -> None:
        """Each event to its consumer, with one call into each event loop."""
        batches: dict[asyncio.AbstractEventLoop, list[_Delivery]] = defaultdict(list)
        for event in events:
            consumer = self._consumers.get(event.request)
            if consumer is None:  # it was closed
                continue
            batches[consumer.loop].append((consumer, (consumer.index_of[event.request], event)))
            if isinstance(event, Terminal):
                del self._consumers[event.request], consumer.index_of[event.request]
        for loop, batch in batches.items():
            try:
                loop.call_soon_threadsafe(_hand_over, batch)
            except RuntimeError:  # the loop is closed, and with it every consumer in it
                for consumer, _ in batch:
                    self._abort_all(consumer)

    def _admit(self, adds: Sequence[Callable[[], int]], consumer: _Consumer) -> None:
        if self._error is not None:
            why = f"{type(self._error).__name__}: {self._error}"
            raise EngineError(f"the engine has stopped ({why}); make a new one") from self._error
        if self._is_closing:
            raise EngineError("the engine is being closed and takes no more requests")
        try:
            for index, add in enumerate(adds):
                number = add()
                consumer.index_of[number] = index
                self._consumers[number] = consumer
        except BaseException:
            self._abort_all(consumer)
            raise

    def _abort_all(self, consumer: _Consumer) -> None:
        for request in consumer.index_of:
            del self._consumers[request]
            self._engine.abort(request)
        consumer.index_of.clear()

    def _begin_to_close(self, drain: bool) -> None:
        self._is_closing = True
        for request in () if drain else self._consumers:
            self._engine.abort(request)

    def _end(self) -> None:
        """Answer all commands, end all requests, let training run: no thread may be left waiting."""
        self._compute_share.idle()
        with self._gate:
            self._is_open = False
        self._is_closing = True
        while not self._commands.empty():
            self._commands.get()()
        self._deliver(self._failed("the engine has stopped before the answer's end"))
        try:
            self._engine.close()
        except Exception:
            _log.exception("the engine could not be closed")

    def _failed(self, why: str) -> list[Event]:
        return [Failed(request, why) for request in self._consumers]


def _call(command: Callable[[], _Result], answer: Future[_Result]) -> None:
    if not answer.set_running_or_notify_cancel():  # the caller was cancelled
        return
    try:
        answer.set_result(command())
    except Exception as error:
        answer.set_exception(error)


def _hand_over(batch: list[_Delivery]) -> None:
    for consumer, item in batch:
        consumer.events.put_nowait(item)

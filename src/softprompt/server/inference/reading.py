"""Long inputs are rendered and tokenised in threads beside the event loop: a few in all, one at a time for a client."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar

from starlette.types import Receive

from softprompt.base import Base
from softprompt.compute_share import interrupted_by
from softprompt.server.errors import ApiError
from softprompt.server.inference.hanging_up import ClientLeftError, unless_gone

_NUM_THREADS = 2
_MOST_OF_ONE_CLIENT = 64  # inputs that are read or wait to be
_LONG = 10_000  # characters that are read in the event loop
_SHRINKING = 16  # characters that may become one, where a tokenizer drops or joins some, and a template whole messages

Result = TypeVar("Result")


class Readers:
    """The threads of one app, and how long an input may be at all."""

    def __init__(self, base: Base) -> None:
        self.max_characters, self.max_chat_characters = _max_characters(base)
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="reader")
        self._turns: dict[str, asyncio.Lock] = {}
        self._num_reading: Counter[str] = Counter()

    async def read(self, client: str, work: Callable[[], Result]) -> Result:
        """What the work gives. Cancelled, it stops where it next breathes, and this comes back when it has."""
        async with self._turn(client):
            is_cancelled = threading.Event()
            future = self._threads.submit(_run, work, is_cancelled)
            try:
                return await asyncio.wrap_future(future)
            except asyncio.CancelledError:
                is_cancelled.set()
                await _end_of(future)
                raise

    @asynccontextmanager
    async def _turn(self, client: str) -> AsyncIterator[None]:
        """Raises ApiError 429 where too many of the client's wait."""
        if self._num_reading[client] >= _MOST_OF_ONE_CLIENT:
            raise ApiError(429, f"{_MOST_OF_ONE_CLIENT} long inputs of this key are waiting to be read; try again",
                           "rate_limit_exceeded", retry_after_s=1.0)  # fmt: skip
        self._num_reading[client] += 1
        try:
            async with self._turns.setdefault(client, asyncio.Lock()):
                yield
        finally:
            self._num_reading[client] -= 1
            if not self._num_reading[client]:
                del self._num_reading[client], self._turns[client]


@dataclass(frozen=True)
class Reading:
    """How the input of one request is read."""

    base: Base
    readers: Readers
    client: str
    receive: Receive

    async def read(self, size: int, work: Callable[[], Result]) -> Result:
        """What the work on so many characters gives. Raises ApiError 499 where the client hangs up meanwhile."""
        if size <= _LONG:
            return work()
        try:
            return await unless_gone(self.receive, self.readers.read(self.client, work))
        except ClientLeftError:
            raise ApiError(499, "the client hung up while its input was read") from None


def _run(work: Callable[[], Result], is_cancelled: threading.Event) -> Result:
    def check() -> None:
        if is_cancelled.is_set():
            raise ClientLeftError

    with interrupted_by(check):
        return work()


async def _end_of(future: Future[Result]) -> None:
    while not future.done():
        await asyncio.sleep(0.01)


def _max_characters(base: Base) -> tuple[int, int]:
    """Characters of a text and of a conversation that are certain to be more tokens than the base has positions.

    No token stands for more characters than it is written with, where a tokenizer takes all of them as they are.
    """
    longest = max(map(len, base.tokenizer.get_vocab()), default=1)
    most = base.max_length * longest
    backend = getattr(base.tokenizer, "backend_tokenizer", None)
    way = repr(getattr(backend, "pre_tokenizer", None))
    takes_all = backend is not None and backend.normalizer is None and "ByteLevel" in way and "Removed" not in way
    return most if takes_all else most * _SHRINKING, most * _SHRINKING

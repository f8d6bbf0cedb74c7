"""Which requests run, and how they end when the server is stopped: some time to finish, then they are cut off."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager

_TICK_S = 0.05


class Lifecycle:
    """One per app. Only its event loop's thread changes it, `begin_to_drain` apart."""

    def __init__(self) -> None:
        self.is_draining = False  # /ready says 503, and no new request is taken
        self.is_cutting_off = False  # requests are being cancelled because the time is over
        self._running: set[asyncio.Task[object]] = set()

    @property
    def num_running(self) -> int:
        """Requests that are being answered, an operator's own (/health, /metrics) apart."""
        return len(self._running)

    @contextmanager
    def running(self) -> Iterator[None]:
        """While the current task answers a request."""
        task = asyncio.current_task()
        assert task is not None, "outside of a task"
        self._running.add(task)
        try:
            yield
        finally:
            self._running.discard(task)

    def begin_to_drain(self) -> None:
        self.is_draining = True

    async def drain(self, seconds: float) -> None:
        """Return when no request runs any more; those that still do after `seconds` are cut off."""
        self.begin_to_drain()
        end = time.monotonic() + seconds
        while self._running and time.monotonic() < end:
            await asyncio.sleep(_TICK_S)
        self.is_cutting_off = True
        for task in self._running:
            task.cancel()
        if self._running:
            await asyncio.wait(set(self._running), timeout=1)

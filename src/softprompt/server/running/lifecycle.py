"""Which requests run, and what ends them early: a server that is stopped, after a while to finish; a revoked key."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from softprompt.errors import SoftpromptError
from softprompt.server.clients.key_ring import KeyRing
from softprompt.server.errors import ApiError
from softprompt.server.running.notes import client_of

_TICK_S = 0.05
_LOOK_S = 0.5  # between two looks for revoked keys; what the key ring knows is up to a second old besides

_log = logging.getLogger(__name__)


class Lifecycle:
    """One per app. Only its event loop's thread changes it, `begin_to_drain` apart."""

    def __init__(self) -> None:
        self.is_draining = False  # /ready says 503, and no new request is taken
        self._running: dict[asyncio.Task[object], Mapping[str, Any]] = {}  # with its ASGI scope
        self._cut_off = WeakKeyDictionary[
            asyncio.Task[object], ApiError
        ]()  # cancelled, and what their clients are told

    @property
    def num_running(self) -> int:
        """Requests that are being answered, an operator's own (/health, /metrics) apart."""
        return len(self._running)

    @property
    def clients(self) -> set[str]:
        """Ids of the keys that are being answered."""
        return {client for scope in self._running.values() if (client := client_of(scope)) is not None}

    @contextmanager
    def running(self, scope: Mapping[str, Any]) -> Iterator[None]:
        """While the current task answers a request."""
        task = asyncio.current_task()
        assert task is not None, "outside of a task"
        self._running[task] = scope
        try:
            yield
        finally:
            del self._running[task]

    def why_cut_off(self) -> ApiError | None:
        """Why the current task was cancelled, where that was done here; asked once."""
        task = asyncio.current_task()
        return None if task is None else self._cut_off.pop(task, None)

    def begin_to_drain(self) -> None:
        self.is_draining = True

    async def drain(self, seconds: float) -> None:
        """Return when no request runs any more; those that still do after `seconds` are cut off."""
        self.begin_to_drain()
        end = time.monotonic() + seconds
        while self._running and time.monotonic() < end:
            await asyncio.sleep(_TICK_S)
        for task in self._running:
            self._cancel(task, stopping())
        if self._running:
            await asyncio.wait(set(self._running), timeout=1)

    def end_revoked(self, client: str) -> None:
        """Cut off what is being answered on a key that was revoked."""
        why = ApiError(401, "the API key was revoked during this answer; ask the server's operator for another",
                       "invalid_api_key")  # fmt: skip
        for task, scope in self._running.items():
            if client_of(scope) == client:
                self._cancel(task, why)

    def _cancel(self, task: asyncio.Task[object], why: ApiError) -> None:
        if task not in self._cut_off:
            self._cut_off[task] = why
            task.cancel()


async def end_revoked_answers(ring: KeyRing, lifecycle: Lifecycle) -> None:
    """Until cancelled: answers on a key end within about a second after it is revoked."""
    while ring.asks:
        await asyncio.sleep(_LOOK_S)
        asking = lifecycle.clients
        try:
            gone = asking - await ring.ids() if asking else set()
        except SoftpromptError as error:  # the database does not answer: then no new request gets in either
            _log.warning("revoked keys cannot be looked for: %s", error)
            continue
        for client in gone:
            lifecycle.end_revoked(client)


def stopping() -> ApiError:
    """What clients are told while the server is being stopped."""
    return ApiError(503, "the server is being stopped; try again soon", "stopping", retry_after_s=5)

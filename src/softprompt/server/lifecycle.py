"""The life of a server: its port bound before the base is loaded, the requests that run, and what ends them early."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary

import uvicorn
from fastapi import FastAPI

from softprompt.config import ServerConfig
from softprompt.errors import ConfigError, SoftpromptError
from softprompt.server.clients.auth import client_of
from softprompt.server.clients.keys import KeyCache
from softprompt.server.dependencies import dependency_of
from softprompt.server.errors import ApiError

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
        ]()  # cancelled, each with the error for its client

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


async def end_revoked_requests(ring: KeyCache, lifecycle: Lifecycle) -> None:
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
    """The error for clients while the server is shutting down."""
    return ApiError(503, "the server is being stopped; try again soon", "stopping", retry_after_s=5)


_KEEP_ALIVE_S = 75  # an idle client's connection; longer than the usual minute of proxies before us
_BACKLOG = 2_048
_LAST_WORDS_S = 5  # for connections to close when all answers have ended
_OPEN_FILES = 65_536


def bind(host: str, port: int) -> socket.socket:
    """A port that is ours and on which nobody is answered yet. Raises ConfigError where it cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    place = socket.socket(family, socket.SOCK_STREAM)
    try:
        place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        place.bind((host.strip("[]"), port))
    except OSError as error:
        place.close()
        why = error.strerror or str(error)
        raise ConfigError(f"cannot listen on {host}, port {port}: {why}; choose another --port or --host") from error
    return place


def url_of(place: socket.socket) -> str:
    """Where clients find it: "http://127.0.0.1:8000"."""
    host, port = place.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run_server(app: FastAPI, place: socket.socket, config: ServerConfig, on_ready: Callable[[], None]) -> None:
    """Serve until SIGINT or SIGTERM. The first lets running answers end, for `drain_s`; a second ends at once.

    `on_ready` is called when requests are taken. What the app's lifespan raises comes out here.
    """
    _allow_open_files()
    Server(app, config, on_ready).run(sockets=[place])


class Server(uvicorn.Server):
    """uvicorn's, with the app's lifespan around it, so that its errors are ours, and with a drain before its end."""

    def __init__(self, app: FastAPI, config: ServerConfig, on_ready: Callable[[], None] = lambda: None) -> None:
        super().__init__(_uvicorn_config(app, config))
        self._app = app
        self._drain_s = config.drain_s
        self._on_ready = on_ready
        self._lifecycle = dependency_of(app, Lifecycle)

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        with self.capture_signals():
            async with self._app.router.lifespan_context(self._app):
                await self._serve(sockets)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """While answers end the port stays open: /ready and new requests get their 503, not silence."""
        await self._lifecycle.drain(self._drain_s)
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            os._exit(128 + sig)
        self._lifecycle.begin_to_drain()
        self.should_exit = True


def _uvicorn_config(app: FastAPI, config: ServerConfig) -> uvicorn.Config:
    return uvicorn.Config(
        app, http="httptools", ws="none", lifespan="off", log_config=None,
        access_log=False, server_header=False, proxy_headers=False, backlog=_BACKLOG,
        timeout_keep_alive=_KEEP_ALIVE_S, timeout_graceful_shutdown=_LAST_WORDS_S,
    )  # fmt: skip


def _allow_open_files() -> None:
    """A thousand idle clients need more than the thousand files that a shell allows; the system's own limit holds."""
    with suppress(ImportError, OSError, ValueError):  # not on Windows
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(_OPEN_FILES, hard)
        if soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))

"""An app on a port: bound before the base is loaded, drained when the process is told to end."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

import uvicorn
from fastapi import FastAPI

from softprompt.config import ServerConfig
from softprompt.errors import ConfigError
from softprompt.server.parts import part_of
from softprompt.server.running.connections import connection_class
from softprompt.server.running.lifecycle import Lifecycle

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
        self._lifecycle = part_of(app, Lifecycle)

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
        app, http=connection_class(config.client_timeout_s), ws="none", lifespan="off", log_config=None,
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

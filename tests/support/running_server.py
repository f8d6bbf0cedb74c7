"""A small app with the operator's layer around it, on the server that `softprompt serve` runs, in a thread."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import Body, FastAPI, Request
from fastapi.responses import StreamingResponse

from softprompt.config import ServerConfig
from softprompt.server.app import create_app
from softprompt.server.dependencies import dependency_of
from softprompt.server.lifecycle import Lifecycle, Server, bind
from softprompt.server.middleware import add_middleware
from softprompt.server.telemetry.metrics import Metrics
from softprompt.server.telemetry.request_log import CurrentRequestLog
from softprompt.server.telemetry.tracing import Tracing


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> str:
        return json.loads(self.body)["error"]["message"]


class Running:
    """The app, where it listens, and a client for it."""

    def __init__(self, app: FastAPI, server: Server, port: int) -> None:
        self.app, self.server, self.port = app, server, port
        self.lifecycle = dependency_of(app, Lifecycle)
        self.metrics = dependency_of(app, Metrics)

    def ask(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Answer:
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)) as connection:
            connection.request(method, path, body, headers or {}, encode_chunked=isinstance(body, Iterator))
            found = connection.getresponse()
            names = {name.lower(): value for name, value in found.getheaders()}
            return Answer(found.status, names, found.read())

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)

    def value(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(f"softprompt:{name}", labels)


def small_app(config: ServerConfig) -> FastAPI:
    parts = (config, Lifecycle(), Metrics(), Tracing(config.traces))
    app = create_app(parts)

    @app.post("/v1/length")
    async def length(request: Request) -> int:
        return len(await request.body())

    @app.post("/v1/files")
    async def files(request: Request) -> int:
        return len(await request.body())

    @app.post("/v1/echo/{name}")
    async def echo(name: str, notes: CurrentRequestLog, value: dict[str, Any] = Body()) -> dict[str, Any]:  # noqa: B008
        notes.model, notes.num_prompt_tokens, notes.num_new_tokens = name, 3, 5
        return value

    @app.get("/v1/broken")
    async def broken() -> None:
        raise RuntimeError("a bug")

    @app.get("/v1/stream")
    async def stream(seconds: float = 0, num_bytes: int = 10) -> StreamingResponse:
        return StreamingResponse(_events(seconds, num_bytes), media_type="text/event-stream")

    add_middleware(app)
    return app


async def _events(seconds: float, num_bytes: int) -> AsyncIterator[bytes]:
    end = time.monotonic() + seconds
    yield b"data: first\n\n"
    while time.monotonic() < end:
        yield b"data: " + b"x" * num_bytes + b"\n\n"
        await asyncio.sleep(0 if num_bytes > 1_000 else 0.01)
    yield b"data: [DONE]\n\n"


@contextmanager
def running(config: ServerConfig, app: FastAPI | None = None) -> Iterator[Running]:
    app = app or small_app(config)
    with bind("127.0.0.1", 0) as place:
        port = place.getsockname()[1]
        server = Server(app, config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [place]}, daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        try:
            yield Running(app, server, port)
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()

"""A whole app on a tiny base, as `softprompt serve` makes it, on a real server: uvicorn in a thread of this process."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import openai
import uvicorn
from fastapi import FastAPI

from softprompt.base import Base
from softprompt.config import EngineConfig, ServerConfig
from softprompt.engine import AsyncEngine, EngineStats
from softprompt.prompt import SoftPrompt
from softprompt.server.clients.keys import KeyCache, Limits
from softprompt.server.clients.quotas import Amounts, Quotas
from softprompt.server.clients.rate_limits import RateLimiter
from softprompt.server.dependencies import dependency_of
from softprompt.server.prompts.model import Model
from softprompt.server.prompts.registry import PromptRegistry
from softprompt.server.start import serving_app
from softprompt.server.state.database import Database


@dataclass(frozen=True)
class AppServer:
    """A running server, and clients for it."""

    app: FastAPI
    url: str
    client: openai.OpenAI
    http: httpx2.Client

    def async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def post(self, path: str, body: Any) -> httpx2.Response:
        """Any JSON, also what the official client would not send."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.http.post(path, content=content, headers={"content-type": "application/json"})

    def stats(self) -> EngineStats:
        return asyncio.run(dependency_of(self.app, AsyncEngine).stats())

    def until_idle(self, seconds: float = 5.0) -> float:
        """Seconds until no request runs or waits in the engine."""
        began = time.monotonic()
        while (stats := self.stats()).num_running or stats.num_waiting:
            assert time.monotonic() - began < seconds, stats
            time.sleep(0.01)
        return time.monotonic() - began

    def until_running(self, num_running: int) -> None:
        end = time.monotonic() + 10
        while self.stats().num_running < num_running:
            assert time.monotonic() < end
            time.sleep(0.005)


@contextmanager
def app_server(
    base: Base,
    state: Path,
    prompts: Mapping[str, SoftPrompt] | None = None,
    engine_config: EngineConfig | None = None,
    **config: Any,
) -> Iterator[AppServer]:
    """The app of a base with its state in a folder, and prompts by name; `config` is ServerConfig's."""
    app = serving_app(base, ServerConfig(state=str(state), **config), engine_config)
    for name, prompt in (prompts or {}).items():
        dependency_of(app, PromptRegistry).publish(Model(id=name, prompt=prompt))
    with serve_app(app) as server:
        yield server


@contextmanager
def serve_app(app: FastAPI) -> Iterator[AppServer]:
    """Any app, with clients for it."""
    with (
        served(app) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
        httpx2.Client(base_url=url) as http,
    ):
        yield AppServer(app, url, client, http)


@contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """Serve an app on a free port of the loopback; gives its URL, "http://127.0.0.1:PORT"."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=10))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
        listener.close()


def open_to_all(database: Database) -> tuple[KeyCache, RateLimiter, Quotas]:
    """What an app that is put together in a test needs to know its clients: no keys, no limits, no quotas."""
    return KeyCache(database, asks=False), RateLimiter(Limits()), Quotas(Limits(), lambda owner: Amounts())


def words(ids: tuple[int, ...]) -> str:
    """The text of ids of a tiny base."""
    return " ".join(f"w{token}" for token in ids)


def events_of(body: str) -> list[Any]:
    """The events of a stream, "[DONE]" as None."""
    assert body.endswith("\n\n"), body[-100:]
    lines = [event.removeprefix("data: ") for event in body[:-2].split("\n\n")]
    return [None if line == "[DONE]" else json.loads(line) for line in lines]

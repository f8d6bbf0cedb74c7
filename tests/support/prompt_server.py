"""A server of prompts for tests: the prompts' routes over a tiny base, with clients told by a header, and a route that
streams an answer's token ids line by line."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import httpx2
from fastapi import FastAPI, Header, Request
from fastapi.responses import StreamingResponse

from softprompt.base import Base
from softprompt.config import EngineConfig, SamplingConfig, ServerConfig
from softprompt.engine import AsyncEngine, Engine, Finished, Tokens
from softprompt.engine import Request as Generation
from softprompt.prompt import SoftPrompt
from softprompt.server.app import create_app
from softprompt.server.clients import auth
from softprompt.server.clients.keys import Client
from softprompt.server.prompts.adapter_import import Hub
from softprompt.server.prompts.library_watcher import LibraryWatcher
from softprompt.server.prompts.model import Alias, Model
from softprompt.server.prompts.pins import Pins, serving_prompts
from softprompt.server.prompts.registry import PromptRegistry
from softprompt.server.prompts.repository import Kept, LibraryFlags, PromptRepository
from softprompt.server.prompts.routes import router
from softprompt.server.state.database import Database
from softprompt.storage.save import adapter_to_bytes
from softprompt.types import PromptRecord
from support.app_server import open_to_all, served
from support.tiny_bases import random_prompt


@dataclass(frozen=True)
class PromptServer:
    """A running server and what is behind it."""

    url: str
    registry: PromptRegistry
    library: LibraryWatcher
    engine: Engine
    pinned: set[str]  # content hashes of the prompts pinned in the engine
    state: Path

    def client(self, name: str = "") -> httpx2.Client:
        """Whose key is `name`; the empty one, and those that begin with admin, are admins'."""
        return httpx2.Client(base_url=self.url, headers={"Authorization": f"Bearer {name}"} if name else {}, timeout=60)


class MemoryRepository:
    """A PromptRepository that keeps nothing: what is served lives in the registry alone."""

    def load(self) -> Kept:
        return Kept([], [], {}, {})

    def write(self, model: Model) -> str:
        return ""

    def add(self, model: Model, folder: str) -> None:
        pass

    def update(self, model: Model, name: str) -> None:
        pass

    def remove(self, name: str, owner: str) -> None:
        pass

    def discard(self, folder: str | None) -> None:
        pass

    def set_flags(self, name: str, flags: LibraryFlags) -> None:
        pass

    def put_alias(self, alias: Alias) -> None:
        pass

    def remove_alias(self, name: str, owner: str) -> None:
        pass


def memory_registry(base_name: str = "tiny") -> PromptRegistry:
    """A registry for tests in which nothing is written."""
    return PromptRegistry(base_name, MemoryRepository())


class RecordingEngine(AsyncEngine):
    """An engine that remembers which prompts are pinned in it."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.pinned: set[str] = set()  # content hashes

    async def pin(self, prompt: SoftPrompt) -> None:
        await super().pin(prompt)
        self.pinned.add(prompt.content_hash)

    async def unpin(self, prompt: SoftPrompt) -> None:
        await super().unpin(prompt)
        self.pinned.discard(prompt.content_hash)


@contextmanager
def prompt_server(
    base: Base, state: Path, library: Path | None = None, engine_config: EngineConfig | None = None, **hub: Any
) -> Iterator[PromptServer]:
    state.mkdir(exist_ok=True, parents=True)
    database = Database.in_folder(state)
    registry = PromptRegistry("tiny", PromptRepository(state, database, base))
    watched = LibraryWatcher(library, base, registry)
    engine = Engine(base, engine_config)
    running = RecordingEngine(engine)
    pins = Pins(running, registry)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with running, serving_prompts(registry, watched, pins):
            yield
        database.close()

    config = ServerConfig(state=str(state))
    dependencies = (base, config, database, registry, watched, pins, Hub(base, **hub), *open_to_all(database))
    app = create_app(dependencies, (router,), lifespan)
    app.dependency_overrides[auth.current_client] = _told_client
    app.post("/stream")(_streaming(registry, running))
    with served(app) as url:
        yield PromptServer(url, registry, watched, engine, running.pinned, state)


async def _told_client(authorization: Annotated[str, Header()] = "") -> Client:
    name = authorization.removeprefix("Bearer ")
    return Client(name, name, is_admin=not name or name.startswith("admin"))


def _streaming(registry: PromptRegistry, running: AsyncEngine) -> Callable[..., Any]:
    async def stream(request: Request) -> StreamingResponse:
        asked = await request.json()
        client = await _told_client(request.headers.get("authorization", ""))
        model = registry.resolve(asked["model"], client, asked.get("user"))
        sampling = SamplingConfig(max_new_tokens=asked.get("max_tokens", 8), ignore_eos=True)
        generation = Generation(tuple(asked["ids"]), model.prompt, sampling)

        async def lines() -> AsyncIterator[str]:
            yield json.dumps({"model": model.id, "alias": model.alias}) + "\n"
            async for event in running.generate(generation):
                if isinstance(event, Tokens):
                    yield json.dumps(event.ids) + "\n"
                else:
                    assert isinstance(event, Finished), event

        return StreamingResponse(lines())

    return stream


def streamed(
    client: httpx2.Client, model: str, ids: tuple[int, ...], **asked: object
) -> tuple[dict[str, Any], list[int]]:
    """What an answer says of its model, and its token ids."""
    with client.stream("POST", "/stream", json={"model": model, "ids": ids, **asked}) as answer:
        assert answer.status_code == 200, answer.read()
        head, *lines = map(json.loads, answer.iter_lines())
    return head, [token for line in lines for token in line]


def made_prompt(base: Base, seed: int = 0, length: int = 4, **record: Any) -> SoftPrompt:
    """A random prompt that says it was made for that base."""
    known = PromptRecord(base_name=base.name, base_fingerprint=base.fingerprint)
    return SoftPrompt(random_prompt(base, length, seed), replace(known, **record))


def as_upload(prompt: SoftPrompt, leave_out: tuple[str, ...] = ("README.md",), **other: bytes) -> list[Any]:
    """An adapter as the files of a form. `other` are files by another name, with '_' for '.' before the ending."""
    files = {name: data for name, data in adapter_to_bytes(prompt).items() if name not in leave_out}
    return [("files", (name, data)) for name, data in {**files, **other}.items()]


def upload(client: httpx2.Client, name: str, prompt: SoftPrompt, **fields: str) -> httpx2.Response:
    return client.post("/v1/prompts", data={"name": name, **fields}, files=as_upload(prompt))


def eventually(holds: Callable[[], bool], within_s: float = 5.0) -> float:
    """Seconds until it holds. Fails where it does not in time."""
    began = time.monotonic()
    while not holds():
        assert time.monotonic() - began < within_s, "it has not come about"
        time.sleep(0.02)
    return time.monotonic() - began

"""The app that serves a base: everything it depends on is made, started and stopped here."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

from fastapi import APIRouter, FastAPI

from softprompt.base import Base
from softprompt.compute_share import ComputeShare
from softprompt.config import EngineConfig, ServerConfig
from softprompt.engine import AsyncEngine, Engine
from softprompt.families import kernel_table
from softprompt.server.app import create_app
from softprompt.server.clients.auth import asks_for_keys, check_listening
from softprompt.server.clients.keys import KeyCache
from softprompt.server.clients.quotas import Quotas
from softprompt.server.clients.rate_limits import RateLimiter
from softprompt.server.inference.api import router as inference_router
from softprompt.server.inference.logprobs import TokenTexts
from softprompt.server.inference.tokenise import TokeniserPool
from softprompt.server.jobs.files import Files
from softprompt.server.jobs.files_routes import router as files_router
from softprompt.server.jobs.jobs import Jobs
from softprompt.server.jobs.routes import router as jobs_router
from softprompt.server.lifecycle import Lifecycle, end_revoked_requests
from softprompt.server.middleware import add_middleware
from softprompt.server.prompts.adapter_import import Hub
from softprompt.server.prompts.library_watcher import LibraryWatcher
from softprompt.server.prompts.pins import Pins, serving_prompts
from softprompt.server.prompts.registry import PromptRegistry
from softprompt.server.prompts.repository import PromptRepository
from softprompt.server.prompts.routes import router as prompts_router
from softprompt.server.state.database import Database
from softprompt.server.state.lock import exclusive
from softprompt.server.telemetry.metrics import Collectors, Metrics
from softprompt.server.telemetry.routes import router as running_router
from softprompt.server.telemetry.tracing import Tracing

MOST_WAITING = 2_048  # answers in the queue by default; more are refused with 503
ROUTERS: tuple[APIRouter, ...] = (running_router, files_router, jobs_router, prompts_router, inference_router)


def serving_app(
    base: Base, config: ServerConfig, engine_config: EngineConfig | None = None, *, offline: bool = False
) -> FastAPI:
    """The app that serves a base. Its lifespan runs the engine. `offline`: no prompt is fetched from the Hub."""
    compute_share = ComputeShare(config.training_share, _seconds(config.training_latency_ms))
    kernel_table(base, training=True)  # measured before there are requests and jobs, if it never was
    engine = AsyncEngine(Engine(base, _with_bounded_queue(engine_config)), compute_share)
    database = Database.of(config)
    check_listening(config, database)
    registry = PromptRegistry(config.base_name or base.name, PromptRepository(Path(config.state), database, base))
    library = LibraryWatcher(None if config.library is None else Path(config.library), base, registry)
    pins = Pins(engine, registry)
    files = Files(database, Path(config.state) / "files", config.max_upload_bytes)
    metrics = Metrics()
    quotas = Quotas.of(config, lambda owner: registry.amounts(owner) + files.amounts(owner))
    jobs = Jobs(base, config, database, registry, files, compute_share, metrics.trained, quotas)
    tracing = Tracing(config.traces)
    keys, limiter, lifecycle = KeyCache(database, asks=asks_for_keys(config)), RateLimiter.of(config), Lifecycle()
    collectors = Collectors(engine, database, lambda: Counter(model.source for model in registry.all_prompts()))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        with exclusive(Path(config.state), database):
            files.clean()
            engine.start()
            await asyncio.to_thread(
                lambda: base.fingerprint
            )  # in every answer; computed once, before there are requests
            try:
                async with serving_prompts(registry, library, pins), _beside(end_revoked_requests(keys, lifecycle)):
                    jobs.start()
                    yield
            finally:
                await asyncio.to_thread(jobs.stop, config.drain_s)
                await engine.close()
                await tracing.close()
                database.close()

    dependencies = (
        base, config, TokenTexts(base), TokeniserPool(base), compute_share, engine, database, registry, library, pins,
        Hub(base, offline=offline), files, jobs, collectors, tracing, metrics, lifecycle, keys, limiter, quotas,
    )  # fmt: skip
    app = create_app(dependencies, ROUTERS, lifespan)
    add_middleware(app)  # the outermost layer, so it comes last
    return app


@asynccontextmanager
async def _beside(work: Coroutine[None, None, None]) -> AsyncIterator[None]:
    """Run the work meanwhile, and cancel it at the end."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _with_bounded_queue(config: EngineConfig | None) -> EngineConfig:
    wanted = config or EngineConfig()
    return wanted if wanted.max_waiting is not None else replace(wanted, max_waiting=MOST_WAITING)


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000

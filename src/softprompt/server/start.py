"""A base as a running server: makes the parts, starts and stops them, and hands the app to uvicorn."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import APIRouter, FastAPI

from softprompt.base import Base
from softprompt.config import EngineConfig, ServerConfig
from softprompt.engine import AsyncEngine, Engine
from softprompt.server.app import create_app
from softprompt.server.prompts.catalogue import Catalogue
from softprompt.server.state.database import Database

ROUTERS: tuple[APIRouter, ...] = ()


def serving_app(base: Base, config: ServerConfig, engine_config: EngineConfig | None = None) -> FastAPI:
    """The app that serves a base. Its lifespan runs the engine."""
    engine = AsyncEngine(Engine(base, engine_config))
    database = Database(config.database) if config.database else Database.in_folder(Path(config.state))
    catalogue = Catalogue(config.base_name or base.name)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        try:
            yield
        finally:
            await engine.close()
            database.close()

    return create_app((base, config, engine, database, catalogue), ROUTERS, lifespan)

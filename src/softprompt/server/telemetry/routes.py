"""/health, /ready and /metrics, for supervisors, load balancers and Prometheus; / and /version, for who comes by.

All but /metrics say nothing of clients and ask for no key. /metrics names prompts and aliases of all clients: where
keys are asked for it takes an admin's, which Prometheus sends as `authorization: {credentials_file: ...}`.
"""

from __future__ import annotations

import asyncio
import logging
from importlib.metadata import version
from typing import Annotated

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from pydantic import BaseModel, ConfigDict, Field

from softprompt.engine import AsyncEngine
from softprompt.errors import DatabaseError
from softprompt.server.clients.auth import CurrentAdmin
from softprompt.server.dependencies import dependency
from softprompt.server.error_schemas import Responses, error_responses
from softprompt.server.lifecycle import Lifecycle
from softprompt.server.state.database import Database
from softprompt.server.telemetry.metrics import Collectors, Metrics

router = APIRouter(tags=["running"])
_log = logging.getLogger(__name__)

DatabaseDep = Annotated[Database, dependency(Database)]
TheEngine = Annotated[AsyncEngine, dependency(AsyncEngine)]
LifecycleDep = Annotated[Lifecycle, dependency(Lifecycle)]
MetricsDep = Annotated[Metrics, dependency(Metrics)]
CollectorsDep = Annotated[Collectors, dependency(Collectors)]


class Status(BaseModel):
    """How it stands."""

    status: str = Field(description="`ok`, or what is wrong.", examples=["ok"])


_VERSION = version("softprompt")
_LINKS = {"openapi": "/openapi.json", "models": "/v1/models", "health": "/health", "ready": "/ready",
          "metrics": "/metrics", "version": "/version"}  # fmt: skip


class Version(BaseModel):
    """In vLLM's shape."""

    version: str = Field(examples=[_VERSION])


class Index(BaseModel):
    """What this is, and where to go on."""

    model_config = ConfigDict(json_schema_extra={"examples": [
        {"name": "softprompt", "version": _VERSION, "links": {**_LINKS}}
    ]})  # fmt: skip

    name: str
    version: str
    links: dict[str, str] = Field(description="Paths of this server, by what they are.")


_STATUS: Responses = {200: {"model": Status, "description": "It is so."},
                      503: {"model": Status, "description": "It is not; `status` says why."}}  # fmt: skip
_TEXT = {
    "description": "Prometheus' text form",
    "content": {"text/plain": {"schema": {"type": "string"}, "example": "softprompt:num_requests_running 3.0\n"}},
}


@router.get("/", summary="What is this?")
async def index() -> Index:
    """The server's name and version, and where its API is described."""
    return Index(name="softprompt", version=_VERSION, links=_LINKS)


@router.get("/version", summary="Which version is it?")
async def server_version() -> Version:
    """The version of softprompt that runs."""
    return Version(version=_VERSION)


@router.get("/health", summary="Is the process alive, and its engine?", responses=_STATUS)
async def health(engine: TheEngine) -> JSONResponse:
    """503 where the engine has stopped: only a new process helps."""
    return _status(None if engine.is_working else "the engine has stopped")


@router.get("/ready", summary="Does the server take requests?", responses=_STATUS)
async def ready(engine: TheEngine, lifecycle: LifecycleDep, database: DatabaseDep) -> JSONResponse:
    """503 also while the server is being stopped and answers what it has begun, and where its database's file is
    another than when it started."""
    stopping = "the server is being stopped" if lifecycle.is_draining else None
    stopped = None if engine.is_working else "the engine has stopped"
    return _status(stopping or stopped or _lost_database(database))


@router.get("/metrics", summary="Collectors for Prometheus", response_class=Response,
            responses={200: _TEXT, **error_responses(401, 403, 429)})  # fmt: skip
async def metrics(admin: CurrentAdmin, metrics: MetricsDep, figures: CollectorsDep) -> Response:
    """vLLM's names with `softprompt:` before them, and those of prompts, jobs and HTTP."""
    text = await asyncio.to_thread(_text, metrics.registry, await figures.look())
    return Response(text, media_type=CONTENT_TYPE_LATEST)


def _lost_database(database: Database) -> str | None:
    try:
        database.check()
    except DatabaseError as error:
        _log.error("not ready: %s", error)
        return "the database's file was replaced or removed"
    return None


def _status(problem: str | None) -> JSONResponse:
    return JSONResponse({"status": problem or "ok"}, 200 if problem is None else 503)


def _text(*registries: CollectorRegistry) -> bytes:
    return b"".join(generate_latest(registry) for registry in registries)

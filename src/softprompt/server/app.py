"""The FastAPI app: its routes, its dependencies, and its error responses."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from contextlib import AbstractAsyncContextManager
from importlib.metadata import version

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import Match

from softprompt.errors import DatabaseError, SoftpromptError, truncated
from softprompt.server.dependencies import set_dependencies
from softprompt.server.error_schemas import DEFAULT_ERROR
from softprompt.server.errors import ApiError, error_response
from softprompt.server.validation_errors import validation_error

_log = logging.getLogger(__name__)
_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")
_LONGEST_PATH = 100  # characters of a path in a message

_DESCRIPTION = """The official `openai` package is a client of it. `model` names a soft prompt, or the base.

Every error has OpenAI's envelope. Bodies are limited in size (413) and must not come too slowly (408), keys have rate
limits (429), and while the server stops every request gets 503.
"""
_TAGS = [
    {"name": "inference", "description": "Completions of texts and conversations, whole or as a stream."},
    {"name": "models", "description": "The base and every soft prompt, by name."},
    {"name": "files", "description": "Rows to train on."},
    {"name": "fine-tuning", "description": "Training of new soft prompts, on the base that goes on serving."},
    {"name": "prompts", "description": "Soft prompts, added, changed and removed while the server runs."},
    {"name": "aliases", "description": "Other names for prompts: switched at once, or shared between several prompts."},
    {"name": "running", "description": "For supervisors, load balancers and Prometheus."},
]

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]


def create_app(
    dependencies: Iterable[object] = (), routers: Iterable[APIRouter] = (), lifespan: Lifespan | None = None
) -> FastAPI:
    """An app with these dependencies and routes. `lifespan` starts and stops what runs beside it."""
    app = FastAPI(
        title="softprompt", summary="OpenAI's API over one frozen base and its soft prompts.", description=_DESCRIPTION,
        version=version("softprompt"), license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
        openapi_tags=_TAGS, responses=DEFAULT_ERROR, generate_unique_id_function=lambda route: route.name,
        docs_url=None, redoc_url=None,  # they load scripts of others, which could then send requests from this origin
        lifespan=lifespan,
    )  # fmt: skip
    set_dependencies(app, dependencies)
    for router in routers:
        app.include_router(router)
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(SoftpromptError, _on_own_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_failure)
    return app


async def _on_api_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return error_response(error)


async def _on_own_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, SoftpromptError)
    found = ApiError.of(error)
    if found.status >= 500 and (found.status != 503 or isinstance(error, DatabaseError)):
        is_known = isinstance(error, DatabaseError)  # its message says all, and each request that meets it logs a line
        _log.error("a request failed%s", f": {error}" if is_known else "", exc_info=None if is_known else error)
    return error_response(found)


async def _on_validation_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return error_response(validation_error(error.errors()))


async def _on_http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    path = truncated(request.url.path, _LONGEST_PATH)
    response = error_response(ApiError(error.status_code, f"{request.method} {path}: {error.detail}"))
    if error.status_code == 405:
        response.headers["Allow"] = ", ".join(sorted(_allowed_methods(request)))
    return response


def _allowed_methods(request: Request) -> set[str]:
    """All methods of this path; a route by itself knows only its own."""
    scopes = {method: {**request.scope, "method": method} for method in _METHODS}
    return {method for method, scope in scopes.items()
            if any(route.matches(scope)[0] == Match.FULL for route in request.app.routes)}  # fmt: skip


async def _on_failure(request: Request, error: Exception) -> JSONResponse:
    _log.error("a request failed", exc_info=error)
    return error_response(ApiError(500, "the server has failed; its log says why"))

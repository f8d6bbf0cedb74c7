"""The FastAPI app: its routes, its parts, and how errors are told."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from importlib.metadata import version

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import Match

from softprompt.errors import DatabaseError, SoftpromptError, truncated
from softprompt.server.dependencies import set_dependencies
from softprompt.server.error_schemas import DEFAULT_ERROR
from softprompt.server.errors import ApiError
from softprompt.server.validation_errors import encodable, validation_error

_log = logging.getLogger(__name__)
_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")
_LONGEST_PATH = 100  # characters of a path that are told back

_DESCRIPTION = """The official `openai` package is a client of it. `model` names a soft prompt, or the base.

Errors have OpenAI's envelope, whatever refused the request. A body has a limit (413) and a pace (408), a key has its
limits (429), and while the server is being stopped every request gets 503.
"""
_TAGS = [
    {"name": "inference", "description": "Answers: texts and conversations continued, whole or as a stream."},
    {"name": "models", "description": "What can be asked for by name: the base and every soft prompt."},
    {"name": "files", "description": "Rows to train on."},
    {"name": "fine-tuning", "description": "Training of new soft prompts, on the base that answers meanwhile."},
    {"name": "prompts", "description": "Soft prompts: added, changed and removed while the server runs."},
    {"name": "aliases", "description": "Other names: switched at once, or shared between prompts."},
    {"name": "running", "description": "For supervisors, load balancers and Prometheus."},
]

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]


def create_app(
    parts: Iterable[object] = (), routers: Iterable[APIRouter] = (), lifespan: Lifespan | None = None
) -> FastAPI:
    """An app with these parts and routes. `lifespan` starts and stops what must run beside it."""
    app = FastAPI(
        title="softprompt", summary="OpenAI's API over one frozen base and its soft prompts.", description=_DESCRIPTION,
        version=version("softprompt"), license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
        openapi_tags=_TAGS, responses=DEFAULT_ERROR, generate_unique_id_function=lambda route: route.name,
        docs_url=None, redoc_url=None,  # they load scripts of others, who could then ask in this origin's name
        lifespan=lifespan,
    )  # fmt: skip
    set_dependencies(app, parts)
    for router in routers:
        app.include_router(router)
    app.add_exception_handler(ApiError, _tell_api_error)
    app.add_exception_handler(SoftpromptError, _tell_own_error)
    app.add_exception_handler(RequestValidationError, _tell_malformed)
    app.add_exception_handler(HTTPException, _tell_http_error)
    app.add_exception_handler(Exception, _tell_failure)
    return app


def _answer(error: ApiError) -> JSONResponse:
    error = replace(
        error, message=encodable(error.message), param=None if error.param is None else encodable(error.param)
    )
    headers = {} if error.retry_after_s is None else {"Retry-After": str(max(1, math.ceil(error.retry_after_s)))}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error.envelope(), error.status, headers)


async def _tell_api_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return _answer(error)


async def _tell_own_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, SoftpromptError)
    told = ApiError.of(error)
    if told.status >= 500 and (told.status != 503 or isinstance(error, DatabaseError)):
        is_known = isinstance(error, DatabaseError)  # says all; every request that meets it would bring a traceback
        _log.error("a request failed%s", f": {error}" if is_known else "", exc_info=None if is_known else error)
    return _answer(told)


async def _tell_malformed(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return _answer(validation_error(error.errors()))


async def _tell_http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    path = truncated(request.url.path, _LONGEST_PATH)
    answer = _answer(ApiError(error.status_code, f"{request.method} {path}: {error.detail}"))
    if error.status_code == 405:
        answer.headers["Allow"] = ", ".join(sorted(_methods(request)))
    return answer


def _methods(request: Request) -> set[str]:
    """What may be asked of this path; a route by itself knows of its own method only."""
    scopes = {method: {**request.scope, "method": method} for method in _METHODS}
    return {method for method, scope in scopes.items()
            if any(route.matches(scope)[0] == Match.FULL for route in request.app.routes)}  # fmt: skip


async def _tell_failure(request: Request, error: Exception) -> JSONResponse:
    _log.error("a request failed", exc_info=error)
    return _answer(ApiError(500, "the server has failed; its log says why"))

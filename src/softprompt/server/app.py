"""The FastAPI app: its routes, its parts, and how errors are told."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from contextlib import AbstractAsyncContextManager

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from softprompt.errors import SoftpromptError
from softprompt.server.errors import ApiError
from softprompt.server.parts import give_parts

_log = logging.getLogger(__name__)

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]


def create_app(
    parts: Iterable[object] = (), routers: Iterable[APIRouter] = (), lifespan: Lifespan | None = None
) -> FastAPI:
    """An app with these parts and routes. `lifespan` starts and stops what must run beside it."""
    app = FastAPI(title="softprompt", summary="OpenAI's API over one frozen base and its soft prompts.",
                  lifespan=lifespan)  # fmt: skip
    give_parts(app, parts)
    for router in routers:
        app.include_router(router)
    app.add_exception_handler(ApiError, _tell_api_error)
    app.add_exception_handler(SoftpromptError, _tell_own_error)
    app.add_exception_handler(RequestValidationError, _tell_malformed)
    app.add_exception_handler(HTTPException, _tell_http_error)
    app.add_exception_handler(Exception, _tell_failure)
    return app


def _answer(error: ApiError) -> JSONResponse:
    headers = {} if error.retry_after_s is None else {"Retry-After": str(max(1, round(error.retry_after_s)))}
    return JSONResponse(error.envelope(), error.status, headers)


async def _tell_api_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return _answer(error)


async def _tell_own_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, SoftpromptError)
    told = ApiError.of(error)
    if told.status >= 500 and told.status != 503:
        _log.error("a request failed", exc_info=error)
    return _answer(told)


async def _tell_malformed(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if part not in ("body", "query", "path"))
    return _answer(ApiError(400, f"{where or 'the body'}: {first['msg']}", "invalid_value", where or None))


async def _tell_http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return _answer(ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}"))


async def _tell_failure(request: Request, error: Exception) -> JSONResponse:
    _log.error("a request failed", exc_info=error)
    return _answer(ApiError(500, "the server has failed; its log says why"))

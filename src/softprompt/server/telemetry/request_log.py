"""What is known of one HTTP request by its end; and the log on stderr, as text or as JSON, one line each.

Every line of a request's carries its id.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
import time
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from fastapi import Depends, Request
from starlette.datastructures import Headers
from starlette.types import Scope

from softprompt.server.clients.auth import client_of

_KEY = "softprompt.notes"  # in the ASGI scope
_SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_OTHER = "other"
_METHODS = frozenset({"GET", "POST", "DELETE", "PUT", "PATCH", "HEAD", "OPTIONS"})


@dataclass
class RequestLog:
    """A route fills in what it knows: `async def route(notes: CurrentRequestLog): notes.model = ...`."""

    id: str
    method: str = "GET"
    status: int = 499  # of its answer; 499: the client hung up before there was one
    model: str | None = None
    num_prompt_tokens: int | None = None
    num_new_tokens: int | None = None
    began: float = field(default_factory=time.perf_counter)

    @classmethod
    def begin(cls, scope: Scope) -> RequestLog:
        """Those of a request that has just come; its id is the client's `x-request-id`, where that is a sane one."""
        given = Headers(scope=scope).get("x-request-id", "")
        known = given if _SANE_ID.fullmatch(given) else f"req-{secrets.token_hex(12)}"
        notes = cls(known, scope["method"] if scope["method"] in _METHODS else _OTHER)
        scope[_KEY] = notes
        return notes

    @property
    def duration_s(self) -> float:
        return time.perf_counter() - self.began

    def fields(self, scope: Scope) -> dict[str, Any]:  # Any: JSON
        """The log line's fields, once the request has been answered."""
        return {"method": self.method, "route": route_of(scope), "status": self.status,
                "duration_ms": round(self.duration_s * 1e3, 1), "client": client_of(scope), "model": self.model,
                "prompt_tokens": self.num_prompt_tokens, "completion_tokens": self.num_new_tokens}  # fmt: skip


def route_of(scope: Mapping[str, Any]) -> str:
    """The path's template, "/v1/models/{name}" say; "other" for a path that no route has."""
    found = getattr(scope.get("route"), "path", None)
    return found if isinstance(found, str) else _OTHER


def _notes(request: Request) -> RequestLog:
    found = request.scope.get(_KEY)
    return found if isinstance(found, RequestLog) else RequestLog.begin(request.scope)


CurrentRequestLog = Annotated[RequestLog, Depends(_notes)]


request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
"""Of the request that the running code answers."""

_QUIET = ("uvicorn", "alembic", "sqlalchemy", "opentelemetry", "watchfiles", "httpx", "asyncio")  # below a warning


def set_up_logging(form: Literal["text", "json"]) -> None:
    """Send this process's log to stderr in that form. For a program's start; a library leaves logging alone."""
    handler = logging.StreamHandler()
    is_unicode = (getattr(handler.stream, "encoding", None) or "utf-8").lower().startswith("utf")
    handler.setFormatter(JsonLines(ascii_only=not is_unicode) if form == "json" else TextLines())
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger("softprompt").setLevel(logging.INFO)
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)


class JsonLines(logging.Formatter):
    """{"time", "level", "logger", "message", "request_id", ...}: what `extra={"fields": {...}}` gave stands beside."""

    def __init__(self, *, ascii_only: bool = False) -> None:
        super().__init__()
        self._ascii_only = ascii_only  # where stderr's encoding lacks characters, JSON's own escapes stay JSON

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {  # Any: JSON
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=self._ascii_only, default=str)


class TextLines(logging.Formatter):
    """`TIME LEVEL message key=value ...`"""

    def format(self, record: logging.LogRecord) -> str:
        fields = (f" {name}={_quoted(value)}" for name, value in _fields(record).items())
        line = f"{_time(record)} {record.levelname:<7} {_one_line(record.getMessage())}{''.join(fields)}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    found = {"request_id": request_id.get(), **getattr(record, "fields", {})}
    return {name: value for name, value in found.items() if value is not None}


def _time(record: logging.LogRecord) -> str:
    """RFC 3339, UTC."""
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))}.{int(record.msecs):03d}Z"


def _quoted(value: object) -> str:
    shown = str(value)
    is_plain = shown.isprintable() and not any(sign in shown for sign in ' "=')
    return shown if is_plain and shown else json.dumps(shown, ensure_ascii=True)


def _one_line(message: str) -> str:
    """A name that a client has sent cannot forge a line of its own."""
    return message.replace("\r", "\\r").replace("\n", "\\n")

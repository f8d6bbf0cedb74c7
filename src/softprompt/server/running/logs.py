"""The log on stderr, as text or as JSON, one line each. Every line of a request's carries its id."""

from __future__ import annotations

import json
import logging
import time
from contextvars import ContextVar
from typing import Any, Literal

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

"""What is known of one HTTP request by its end, for the log, the metrics and the trace."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from fastapi import Depends, Request

_KEY = "softprompt.notes"  # in the ASGI scope
_SANE_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_OTHER = "other"
_METHODS = frozenset({"GET", "POST", "DELETE", "PUT", "PATCH", "HEAD", "OPTIONS"})

Scope = MutableMapping[str, Any]  # Any: as ASGI has it


@dataclass
class Notes:
    """A route fills in what it knows: `async def route(notes: TheNotes): notes.model = ...`."""

    id: str
    method: str = "GET"
    model: str | None = None
    num_prompt_tokens: int | None = None
    num_new_tokens: int | None = None
    began: float = field(default_factory=time.perf_counter)

    @classmethod
    def begin(cls, scope: Scope) -> Notes:
        """Those of a request that has just come; its id is the client's `x-request-id`, where that is a sane one."""
        given = header_of(scope, b"x-request-id")
        known = given.decode() if given is not None and _SANE_ID.fullmatch(given) else f"req-{secrets.token_hex(12)}"
        notes = cls(known, scope["method"] if scope["method"] in _METHODS else _OTHER)
        scope[_KEY] = notes
        return notes

    @property
    def duration_s(self) -> float:
        return time.perf_counter() - self.began


def header_of(scope: Mapping[str, Any], name: bytes) -> bytes | None:
    """The first header of that name, which is given in lower case."""
    return next((value for key, value in scope["headers"] if key == name), None)


def route_of(scope: Mapping[str, Any]) -> str:
    """The path's template, "/v1/models/{name}" say; "other" for a path that no route has."""
    found = getattr(scope.get("route"), "path", None)
    return found if isinstance(found, str) else _OTHER


def client_of(scope: Mapping[str, Any]) -> str | None:
    """The id of the key's holder, once the request's key was looked at; None where no keys are asked for."""
    found = scope.get("state", {}).get("client")
    return getattr(found, "id", None) or None


def _notes(request: Request) -> Notes:
    found = request.scope.get(_KEY)
    return found if isinstance(found, Notes) else Notes.begin(request.scope)


TheNotes = Annotated[Notes, Depends(_notes)]

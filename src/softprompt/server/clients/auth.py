"""Who asks, as a route's dependency: `async def route(client: CurrentClient)`; and where keys are asked for."""

from __future__ import annotations

import ipaddress
from collections.abc import Awaitable, Callable, Mapping
from typing import Annotated, Any

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from softprompt.config import ServerConfig
from softprompt.errors import ConfigError
from softprompt.server.clients.keys import Client, KeyCache, has_keys
from softprompt.server.clients.rate_limits import RateLimiter, count_request
from softprompt.server.dependencies import dependency_of
from softprompt.server.errors import ApiError
from softprompt.server.state.database import Database

_BEARER = HTTPBearer(auto_error=False, description="An API key, sp-...; where the server asks for one.")


async def current_client(
    request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_BEARER)]
) -> Client:
    keys = dependency_of(request.app, KeyCache)
    client = await keys.client(credentials.credentials if credentials else None)
    request.state.client = client  # the log and the traces name it
    count_request(request.scope, dependency_of(request.app, RateLimiter), client)
    return client


CurrentClient = Annotated[Client, Depends(current_client)]
"""The holder of the request's key; where no keys are asked for, the operator. Refuses with 401, and with
429 where its requests are used up: every route that asks for the client counts as one."""


async def current_admin(client: CurrentClient) -> Client:
    if not client.is_admin:
        raise ApiError(403, "this needs an admin's API key; the operator makes one with softprompt keys create --admin")
    return client


CurrentAdmin = Annotated[Client, Depends(current_admin)]
"""The same, refused with 403 where the key is not an admin's."""


def client_of(scope: Mapping[str, Any]) -> str | None:
    """The id of the key's holder, once the request's key was looked at; None where no keys are asked for."""
    found = scope.get("state", {}).get("client")
    return getattr(found, "id", None) or None


Scope = dict[str, Any]  # Any: as ASGI has it
App = Callable[[Any, Any, Any], Awaitable[None]]

_OWN_NAMES = ("localhost",)


def asks_for_keys(config: ServerConfig) -> bool:
    """Whether a request needs an API key: always where others than this machine could send one."""
    return config.require_keys or not is_loopback(config.host)


def check_listening(config: ServerConfig, database: Database) -> None:
    """Raises ConfigError where keys are asked for and nobody has one."""
    if asks_for_keys(config) and not has_keys(database):
        why = "require_keys is set" if config.require_keys else f"host {config.host!r} is not loopback"
        raise ConfigError(f"{why}, so every request needs an API key, and there is none in the database "
                          f"{database.name}; make one: softprompt keys create NAME")  # fmt: skip


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach that address. A name other than localhost is not looked up."""
    if host.lower().rstrip(".") in _OWN_NAMES:
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False

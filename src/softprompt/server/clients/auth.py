"""Who asks, as a route's dependency: `async def route(client: CurrentClient)`; and where keys are asked for."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from typing import Annotated, Any
from urllib.parse import urlsplit

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.datastructures import Headers

from softprompt.config import ServerConfig
from softprompt.errors import ConfigError, shortened
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
    count_request(request, dependency_of(request.app, RateLimiter), client)
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


def foreign_page(headers: Headers) -> ApiError | None:
    """Why a server without keys refuses a request: another web page makes a browser send it.

    Such a page can post to the loopback by its address (Origin names it), or have its own name resolve to the loopback
    (DNS rebinding: Host names it). Programs send neither.
    """
    hosts = headers.getlist("host")
    foreign = next((host for host in hosts if not is_loopback(_name(host))), None)
    if foreign is not None:
        return ApiError(403, f"the Host is {shortened(foreign)}; without API keys this server answers to loopback "
                             "names alone: use 127.0.0.1, or start it with --require-keys", "foreign_host")  # fmt: skip
    other = next((origin for origin in headers.getlist("origin") if not _is_own(origin, hosts)), None)
    if other is not None:
        return ApiError(403, f"the Origin is {shortened(other)}; without API keys this server accepts nothing from "
                             "other web pages: start it with --require-keys", "foreign_origin")  # fmt: skip
    return None


def _name(host: str) -> str:
    """A Host header's name without its port; empty if it cannot be parsed."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _is_own(origin: str, hosts: list[str]) -> bool:
    scheme, _, authority = origin.partition("://")
    return scheme in ("http", "https") and authority.lower() in [host.lower() for host in hosts]

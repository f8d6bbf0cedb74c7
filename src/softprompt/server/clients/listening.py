"""Where a server may listen without asking for keys, and who may speak to it there."""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

from softprompt.config import ServerConfig
from softprompt.errors import ConfigError, shortened
from softprompt.server.clients.keys import has_keys
from softprompt.server.errors import ApiError
from softprompt.server.state.database import Database

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


class OwnPagesOnly:
    """ASGI middleware for a server without keys: refuses what a web page of somebody else makes a browser send.

    Such a page can post to the loopback by its address (its Origin tells), or have its own name resolve to it (DNS
    rebinding; then the Host is not ours). Programs send neither.
    """

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        refusal = _refusal(scope) if scope["type"] in ("http", "websocket") else None
        if refusal is None:
            await self._app(scope, receive, send)
        else:
            await _refuse(refusal, scope["type"], send)


def _refusal(scope: Scope) -> ApiError | None:
    hosts, origins = _headers(scope, b"host"), _headers(scope, b"origin")
    foreign = next((host for host in hosts if not is_loopback(_name(host))), None)
    if foreign is not None:
        return ApiError(403, f"the Host is {shortened(foreign)}; without API keys this server answers to loopback "
                             "names alone: use 127.0.0.1, or start it with --require-keys", "foreign_host")  # fmt: skip
    other = next((origin for origin in origins if not _is_own(origin, hosts)), None)
    if other is not None:
        return ApiError(403, f"the Origin is {shortened(other)}; without API keys this server takes nothing from other "
                             "web pages: start it with --require-keys", "foreign_origin")  # fmt: skip
    return None


def _headers(scope: Scope, name: bytes) -> list[str]:
    return [value.decode("latin-1") for key, value in scope["headers"] if key == name]


def _name(host: str) -> str:
    """A Host header's name, its port cut off; empty where it cannot be read."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _is_own(origin: str, hosts: list[str]) -> bool:
    scheme, _, place = origin.partition("://")
    return scheme in ("http", "https") and place.lower() in [host.lower() for host in hosts]


async def _refuse(error: ApiError, kind: str, send: Any) -> None:
    if kind == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    content = json.dumps(error.envelope()).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": content})

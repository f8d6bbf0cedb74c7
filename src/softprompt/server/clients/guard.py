"""What stands between the network and every route: keys, limits, and where there are no keys, whose page may ask."""

from __future__ import annotations

from fastapi import FastAPI

from softprompt.config import ServerConfig
from softprompt.server.clients.key_ring import KeyRing
from softprompt.server.clients.limiter import Limiter
from softprompt.server.clients.listening import OwnPagesOnly, asks_for_keys
from softprompt.server.clients.rate_headers import RateHeaders
from softprompt.server.parts import part_of
from softprompt.server.state.database import Database


def keys_and_limits(config: ServerConfig, database: Database) -> tuple[KeyRing, Limiter]:
    """The parts of an app that `TheClient` works with."""
    return KeyRing(database, asks=asks_for_keys(config)), Limiter.of(config)


def guard(app: FastAPI) -> None:
    """Put this around an app that has these parts."""
    app.add_middleware(RateHeaders)
    if not part_of(app, KeyRing).asks:
        app.add_middleware(OwnPagesOnly)

"""Who sent a request, by its key. What the database says of keys is read again once a second at most."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping

from softprompt.server.clients.client import Client
from softprompt.server.clients.keys import clients_by_hash, hash_of, keys_version
from softprompt.server.errors import ApiError
from softprompt.server.state.database import Database

_FRESH_S = 1.0  # a new key is known, and a revoked one refused, after so long


class KeyRing:
    """All keys that are not revoked, by their hashes.

    A wrong key is looked for among them and nowhere else: who guesses neither fills the memory nor asks the database.
    """

    def __init__(self, database: Database, *, asks: bool, clock: Callable[[], float] = time.monotonic) -> None:
        """`asks`: whether a key is needed at all."""
        self.asks = asks
        self._database = database
        self._clock = clock
        self._looking: asyncio.Future[None] | None = None
        self._clients: Mapping[str, Client] = {}
        self._version: tuple[object, ...] | None = None
        self._read: float | None = None  # when, by the clock

    async def client(self, secret: str | None) -> Client:
        """Whose key it is; without keys, the operator. Raises ApiError 401 for a wrong or a missing one.

        Nobody gets in while the database does not answer: DatabaseError, which is 503.
        """
        if not self.asks:
            return Client()
        if secret is None:
            raise ApiError(
                401, "this server asks for an API key; send it as Authorization: Bearer sp-...", "no_api_key"
            )
        await self._refresh()
        found = self._clients.get(hash_of(secret))
        if found is None:
            raise ApiError(401, "the API key is wrong or revoked; ask the server's operator for one", "invalid_api_key")
        return found

    async def ids(self) -> set[str]:
        """Of the clients whose keys are not revoked. Raises DatabaseError."""
        await self._refresh()
        return {client.id for client in self._clients.values()}

    async def _refresh(self) -> None:
        if self._is_fresh():
            return
        if self._looking is None:
            self._looking = asyncio.ensure_future(asyncio.to_thread(self._look))
            self._looking.add_done_callback(self._looked)
        await asyncio.shield(self._looking)  # one looks, and all who came meanwhile share what it finds, or its error

    def _looked(self, looking: asyncio.Future[None]) -> None:
        self._looking = None
        if not looking.cancelled():
            looking.exception()  # everybody who waited for it may have gone

    def _is_fresh(self) -> bool:
        return self._read is not None and self._clock() - self._read < _FRESH_S

    def _look(self) -> None:
        began = self._clock()
        version = keys_version(self._database)
        if version != self._version:
            self._clients, self._version = clients_by_hash(self._database), version
        self._read = began

"""API keys: made, listed, revoked, and who it is that holds one.

A key is `sp-` and 32 random bytes; the database keeps its sha256. A plain hash is right here: slow, salted hashes
protect passwords, which people choose from few; 256 random bits are not found by trying, at any speed, and no table of
them can be made beforehand. Looking one up by its hash tells nothing by its time either: who sends a key does not know
its hash, nor that of another key that resembles it.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace

from sqlalchemy import func, select

from softprompt.errors import ConfigError
from softprompt.server.errors import ApiError
from softprompt.server.state.database import Database
from softprompt.server.state.schema import KeyRow

PREFIX = "sp-"
_SHOWN = 7  # characters of a key that are kept to tell it by: `sp-` and 24 of its 256 bits
_LONGEST_NAME = 100


@dataclass(frozen=True, kw_only=True)
class Key:
    """What is known of an API key; the key itself is not."""

    id: str  # the owner of what its holder makes
    name: str
    beginning: str  # the key's first characters
    is_admin: bool
    created: float  # seconds since 1970
    revoked: float | None
    limits: Limits


def create_key(
    database: Database, name: str, *, is_admin: bool = False, limits: Limits | None = None
) -> tuple[Key, str]:
    """A new key, and its secret, which is nowhere kept. Raises ConfigError for a name or a limit that cannot be."""
    limits = limits or Limits()
    _check(name, limits)
    secret = PREFIX + secrets.token_urlsafe(32)
    row = KeyRow(id=f"key-{secrets.token_hex(12)}", name=name, hash=hash_of(secret), beginning=secret[:_SHOWN],
                 is_admin=is_admin, created=time.time(), revoked=None, limits=asdict(limits))  # fmt: skip
    with database.session() as session:
        session.add(row)
    return _key(row), secret


def list_keys(database: Database) -> list[Key]:
    """All keys, revoked ones too, the oldest first."""
    with database.session() as session:
        return [_key(row) for row in session.scalars(select(KeyRow).order_by(KeyRow.created, KeyRow.id))]


def revoke_key(database: Database, key_id: str) -> Key:
    """Take a key's rights for good; one already revoked stays as it is. Raises ConfigError where there is none."""
    with database.session() as session:
        row = session.get(KeyRow, key_id)
        if row is None:
            raise ConfigError(f"there is no key {key_id!r}; softprompt keys list shows their ids")
        row.revoked = row.revoked or time.time()
        return _key(row)


def hash_of(secret: str) -> str:
    """What is kept of a key: sha256, hex."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def keys_version(database: Database) -> tuple[object, ...]:
    """Differs as soon as a key was made or revoked."""
    changed = (func.count(KeyRow.id), func.count(KeyRow.revoked), func.max(KeyRow.created), func.max(KeyRow.revoked))
    with database.session() as session:
        return tuple(session.execute(select(*changed)).one())


def clients_by_hash(database: Database) -> dict[str, Client]:
    """Whom every key that is not revoked belongs to, by the key's hash."""
    with database.session() as session:
        rows = session.scalars(select(KeyRow).where(KeyRow.revoked.is_(None)))
        return {row.hash: _client(_key(row)) for row in rows}


def has_keys(database: Database) -> bool:
    """Whether anybody has a key that is not revoked."""
    with database.session() as session:
        return session.scalar(select(KeyRow.id).where(KeyRow.revoked.is_(None)).limit(1)) is not None


def _key(row: KeyRow) -> Key:
    known = {name: row.limits[name] for name in asdict(Limits()) if name in row.limits}
    return Key(id=row.id, name=row.name, beginning=row.beginning, is_admin=row.is_admin, created=row.created,
               revoked=row.revoked, limits=replace(Limits(), **known))  # fmt: skip


def _client(key: Key) -> Client:
    return Client(id=key.id, name=key.name, is_admin=key.is_admin, limits=key.limits)


def _check(name: str, limits: Limits) -> None:
    if not 0 < len(name) <= _LONGEST_NAME or not name.isprintable():
        raise ConfigError(f"a key's name is {name!r}; it must have 1 to {_LONGEST_NAME} printable characters")
    for what, value in asdict(limits).items():
        if value is not None and value < 1:
            raise ConfigError(f"{what} is {value}; it must be at least 1")


OPERATOR = ""  # the owner of what belongs to the machine's operator: shared things, and all where no keys are asked for


@dataclass(frozen=True)
class Limits:
    """What one key may ask for; None: as the server's settings say."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_concurrent: int | None = None  # generations that wait or run
    max_jobs: int | None = None  # fine-tuning jobs that wait or run
    max_prompts: int | None = None  # that are kept; and as many aliases
    max_files: int | None = None
    max_stored_bytes: int | None = None  # of files, and of prompts' vectors

    def or_else(self, defaults: Limits) -> Limits:
        """These, and the defaults where there is none."""
        given = {name: value for name, value in asdict(self).items() if value is not None}
        return replace(defaults, **given)


@dataclass(frozen=True)
class Client:
    """One API key's holder. Its prompts, files and jobs carry `id` as their owner."""

    id: str = OPERATOR
    name: str = "local"
    is_admin: bool = True  # where no keys are asked for, whoever reaches the server operates it
    limits: Limits = field(default_factory=Limits)


_FRESH_S = 1.0  # a new key is known, and a revoked one refused, after so long


class KeyCache:
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

"""How much one client may have the server keep: prompts, files, aliases, and the bytes of the first two together.

What is being added counts while it comes, so that requests side by side do not pass the limit together; what is there
is counted anew each time, so that nothing is forgotten after a deletion or a kill.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Annotated

from softprompt.config import ServerConfig
from softprompt.server.clients.keys import Client, Limits
from softprompt.server.dependencies import dependency
from softprompt.server.errors import ApiError


@dataclass(frozen=True, kw_only=True)
class Amounts:
    """What is kept for one client, or is to be."""

    prompts: int = 0
    aliases: int = 0
    files: int = 0
    num_bytes: int = 0  # of files, and of prompts' vectors

    def __add__(self, other: Amounts) -> Amounts:
        return Amounts(prompts=self.prompts + other.prompts, aliases=self.aliases + other.aliases,
                       files=self.files + other.files, num_bytes=self.num_bytes + other.num_bytes)  # fmt: skip


@dataclass(eq=False)
class Reservation:
    """Room for what one request adds, until it is kept or refused."""

    client: Client
    wanted: Amounts


@dataclass(eq=False)
class _Account:
    """One owner's, while it has reservations."""

    used: Amounts  # at most: what is kept and reserved no more
    coming: list[Reservation] = field(default_factory=list)

    @property
    def all(self) -> Amounts:
        return sum((each.wanted for each in self.coming), start=self.used)


class Quotas:
    """The quotas of all clients: a key's own, else the server's, which hold for all keys but admins'."""

    def __init__(self, defaults: Limits, used: Callable[[str], Amounts]) -> None:
        """`used`: what is kept for an owner; it may ask the database."""
        self._defaults = defaults
        self._used = used
        self._lock = threading.Lock()  # never held while the database is asked: an event loop waits for it too
        self._accounts: dict[str, _Account] = {}  # by owner
        self._num_kept = 0

    @classmethod
    def of(cls, config: ServerConfig, used: Callable[[str], Amounts]) -> Quotas:
        """By the server's settings."""
        limits = Limits(max_prompts=config.max_prompts, max_files=config.max_files,
                        max_stored_bytes=config.max_stored_bytes)  # fmt: skip
        return cls(limits, used)

    def check(self, client: Client, wanted: Amounts) -> None:
        """Raises ApiError 403 where there is no room for it. Blocks on the database."""
        self.release(self.reserve(client, wanted), is_kept=False)

    @contextmanager
    def reserved(self, client: Client, wanted: Amounts) -> Iterator[None]:
        """Room for it, which is kept before the end. Raises as `check` does."""
        reservation, is_kept = self.reserve(client, wanted), False
        try:
            yield
            is_kept = True
        finally:
            self.release(reservation, is_kept=is_kept)

    def reserve(self, client: Client, wanted: Amounts) -> Reservation:
        """Room for it until `release`. Raises as `check` does."""
        while True:
            num_kept, found = self._num_kept, self._used(client.id)
            with self._lock:
                if num_kept == self._num_kept:  # else it may not have been counted
                    return self._reserve(client, wanted, found)

    def grow(self, reservation: Reservation, num_bytes: int) -> None:
        """So many bytes more have come. Raises ApiError 403; never waits."""
        more = Amounts(num_bytes=num_bytes)
        with self._lock:
            _check(self._limits(reservation.client), self._accounts[reservation.client.id].all, more)
            reservation.wanted += more

    def release(self, reservation: Reservation, *, is_kept: bool) -> None:
        """What was reserved is there, or will not come."""
        owner = reservation.client.id
        with self._lock:
            account = self._accounts[owner]
            account.coming.remove(reservation)
            if is_kept:
                account.used += reservation.wanted
                self._num_kept += 1
            if not account.coming:
                del self._accounts[owner]

    def _reserve(self, client: Client, wanted: Amounts, found: Amounts) -> Reservation:
        """`found` has what is kept but not released yet, the account what was deleted meanwhile: one may do."""
        limits, account = self._limits(client), self._accounts.get(client.id, _Account(found))
        try:
            _check(limits, account.all, wanted)
        except ApiError:
            _check(limits, replace(account, used=found).all, wanted)
            account.used = found
        reservation = Reservation(client, wanted)
        account.coming.append(reservation)
        self._accounts[client.id] = account
        return reservation

    def _limits(self, client: Client) -> Limits:
        return client.limits if client.is_admin else client.limits.or_else(self._defaults)


def _check(limits: Limits, used: Amounts, wanted: Amounts) -> None:
    for what, most, there, more in (
        ("prompts", limits.max_prompts, used.prompts, wanted.prompts),
        ("aliases", limits.max_prompts, used.aliases, wanted.aliases),
        ("files", limits.max_files, used.files, wanted.files),
        ("bytes of files and prompts", limits.max_stored_bytes, used.num_bytes, wanted.num_bytes),
    ):
        if most is not None and more > 0 and there + more > most:
            why = f"this key has {there:,} {what} and may have {most:,}, which leaves no room for {more:,} more"
            raise ApiError(403, f"{why}; delete some, or ask the server's operator for more", "quota_exceeded")


QuotasDep = Annotated[Quotas, dependency(Quotas)]

"""One server at a time on one state: jobs belong to the process that runs them."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from softprompt.errors import StorageError
from softprompt.server.state.database import LOCK, Database, make_private

_NUMBER = 7_364_928_115_340_022  # the same of a database on PostgreSQL


@contextlib.contextmanager
def exclusive(folder: Path, database: Database) -> Iterator[None]:
    """A state folder and its database as this server's own. Raises StorageError where another server has one of them.

    Commands that only read and write rows (softprompt keys) need not hold them.
    """
    make_private(folder)
    with _held_file(folder / LOCK, f"the state folder {folder}"), _held_database(database):  # until the process ends
        yield


@contextlib.contextmanager
def _held_database(database: Database) -> Iterator[None]:
    """It may lie elsewhere, so that two folders could meet there."""
    what = f"the database {database.name}"
    if database.url.database is not None and database.url.drivername == "sqlite":
        with _held_file(Path(f"{database.url.database}.lock"), what):
            yield
        return
    with database.server_lock(_NUMBER) as is_ours:
        if not is_ours:
            raise _taken(what)
        yield


@contextlib.contextmanager
def _held_file(path: Path, what: str) -> Iterator[None]:
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}; choose another place") from error
    try:
        _lock(descriptor, what)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, what: str) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise _taken(what) from error


def _taken(what: str) -> StorageError:
    return StorageError(f"another server works on {what}; stop that one, or choose another place for this one")

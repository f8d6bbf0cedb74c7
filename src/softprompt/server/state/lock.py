"""One server at a time on one state: jobs belong to the process that runs them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from softprompt.errors import StorageError
from softprompt.server.state.database import LOCK, Database, make_private

_NUMBER = 7_364_928_115_340_022  # of the lock of a database on PostgreSQL


@contextlib.contextmanager
def exclusive(folder: Path, database: Database) -> Iterator[None]:
    """Lock a state folder and its database for this server. Raises StorageError if another server has one of them.

    The system releases the locks of a process that is killed. Commands that only read and write rows (softprompt keys)
    need no lock.
    """
    make_private(folder)
    with _file_lock(folder / LOCK, f"the state folder {folder}"), _database_lock(database):
        yield


@contextlib.contextmanager
def _database_lock(database: Database) -> Iterator[None]:
    """The database may be elsewhere, and two folders may share it."""
    what = f"the database {database.name}"
    if database.url.database is not None and database.url.drivername == "sqlite":
        with _file_lock(Path(f"{database.url.database}.lock"), what):
            yield
        return
    with database.server_lock(_NUMBER) as is_ours:
        if not is_ours:
            raise _in_use(what)
        yield


@contextlib.contextmanager
def _file_lock(path: Path, what: str) -> Iterator[None]:
    lock = FileLock(path, timeout=0, mode=0o600, thread_local=False)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise _in_use(what) from error
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}; choose another folder") from error
    try:
        yield
    finally:
        lock.release()


def _in_use(what: str) -> StorageError:
    return StorageError(f"another server works on {what}; stop that one, or choose another for this one")

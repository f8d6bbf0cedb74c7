"""The database: SQLite in the state folder, or PostgreSQL by its URL. Any thread may use it."""

from __future__ import annotations

import errno
import importlib.util
import logging
import math
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import URL, Connection, Engine, Select, create_engine, event, exc, make_url, text, tuple_
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.orm import InstrumentedAttribute, Session, sessionmaker

from softprompt.config import ServerConfig
from softprompt.errors import ConfigError, DatabaseError, DataError, MissingDependencyError, StorageError
from softprompt.server.state.migrations import migrate
from softprompt.server.state.schema import Table

_DISK_FULL = "53100"  # PostgreSQL's word for it
_PATIENCE_S = 10.0  # for another's transaction or lock, and for a connection
_REFUSED_VALUES = (exc.DataError, UnicodeEncodeError, OverflowError)
_OF_STATEMENTS = (exc.IntegrityError, exc.ProgrammingError, exc.NotSupportedError)  # not of the database as a whole


Row = TypeVar("Row", bound=Table)


class Database:
    """`with database.session() as session:` is one transaction, committed at its end or rolled back."""

    def __init__(self, url: str, patience_s: float = _PATIENCE_S) -> None:
        """Opens it, and brings its tables to this release's form. `patience_s`: the longest wait for others' locks.

        Raises ConfigError for a URL that cannot be meant, DatabaseError where it does not answer or is of a newer
        release.
        """
        self.url = database_url(url)
        self.name = self.url.render_as_string()  # without its password
        self._is_open = False
        self._file = None if self.url.drivername != "sqlite" else Path(str(self.url.database))
        self._transactions = None if self._file is None else Transactions(self.name, patience_s)
        if self._file is not None:
            _make_file(self._file)
        self._engine = _engine(self.url, patience_s)
        try:
            with self._own_errors():
                migrate(self._engine)
        except BaseException:
            self._engine.dispose()
            raise
        self._is_open = True
        self._opened = self._identity()
        self._sessions = sessionmaker(self._engine, expire_on_commit=False)

    @classmethod
    def in_folder(cls, folder: Path) -> Database:
        """SQLite in a state folder, which is made where it is missing. Raises as `make_private` does."""
        make_private(folder)
        return cls(URL.create("sqlite", database=str(folder / DATABASE)).render_as_string())

    @classmethod
    def of(cls, config: ServerConfig) -> Database:
        """The one that the settings mean. Raises as the others do."""
        return cls.in_folder(Path(config.state)) if config.database is None else cls(config.database)

    @contextmanager
    def session(self) -> Iterator[Session]:
        """Raises DatabaseError where the database does not answer, DataError for a value that it cannot hold."""
        self.check()
        if self._transactions is None:
            with self._own_errors(), self._sessions.begin() as session:
                yield session
            return
        with self._own_errors(), self._transactions.one() as begun, self._sessions.begin() as session:
            session.connection()  # takes the file's lock
            begun()
            yield session

    def check(self) -> None:
        """Raises DatabaseError where a SQLite file is not the one that was opened: what is written would be lost."""
        if self._identity() != self._opened:
            raise DatabaseError(f"the file of the database {self.name} was replaced or removed while it was in use; "
                                "restart the server")  # fmt: skip

    @contextmanager
    def server_lock(self, number: int) -> Iterator[bool]:
        """PostgreSQL's lock of that number, for as long as this process has it: gives whether it does."""
        with self._own_errors(), self._engine.connect() as connection:
            connection.execution_options(isolation_level="AUTOCOMMIT")  # no transaction that stays open
            try:
                yield bool(connection.scalar(text("SELECT pg_try_advisory_lock(:number)"), {"number": number}))
            finally:
                connection.invalidate()  # ends the session, and the lock with it

    def close(self) -> None:
        self._engine.dispose()

    def _identity(self) -> tuple[int, int] | None:
        """Which file it is, whatever its path comes to mean."""
        if self._file is None:
            return None
        try:
            found = self._file.stat()
        except OSError:
            return (0, 0)
        return found.st_dev, found.st_ino

    @contextmanager
    def _own_errors(self) -> Iterator[None]:
        """What the driver says, as an error of ours."""
        try:
            yield
        except _REFUSED_VALUES as error:
            raise DataError("the database cannot hold one of the values: too long, too large or no text") from error
        except exc.TimeoutError as error:  # of the pool of connections
            raise DatabaseError(f"the database {self.name} is busy: no connection has come free") from error
        except DBAPIError as error:
            if self._is_open and isinstance(error, _OF_STATEMENTS):
                raise
            raise self._refusal(error) from error

    def _refusal(self, error: DBAPIError) -> DatabaseError:
        found = DatabaseError(f"the database {self.name} cannot be used: {_reason(error)}")
        found.errno = errno.ENOSPC if _is_full(error) else None
        return found


def page_of(
    session: Session,
    query: Select[Row],
    keys: Sequence[InstrumentedAttribute[Any]],
    after: Row | None,
    limit: int,
    *,
    newest_first: bool = True,
) -> tuple[list[Row], bool]:
    """Rows of a query in the order of their keys, from behind the row `after`; and whether more than `limit` follow."""
    if after is not None:
        behind, last = tuple_(*keys), tuple_(*(getattr(after, key.key) for key in keys))
        query = query.where(behind < last if newest_first else behind > last)
    query = query.order_by(*(key.desc() if newest_first else key.asc() for key in keys)).limit(limit + 1)
    found = list(session.scalars(query))
    return found[:limit], len(found) > limit


def _is_full(error: DBAPIError) -> bool:
    return "disk is full" in _reason(error) or getattr(error.orig, "sqlstate", None) == _DISK_FULL


def _reason(error: DBAPIError) -> str:
    return str(error.orig).strip().splitlines()[0]


def _make_file(path: Path) -> None:
    """Nobody else's to read; what cannot be made SQLite says better."""
    with suppress(OSError):
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))


def _engine(url: URL, patience_s: float) -> Engine:
    if url.drivername != "sqlite":
        waits = {"connect_timeout": math.ceil(patience_s)}
        engine = create_engine(
            url, hide_parameters=True, pool_pre_ping=True, pool_timeout=patience_s, connect_args=waits
        )
        event.listen(engine, "connect", partial(_set_up_postgresql, patience_s))
        return engine
    engine = create_engine(url, hide_parameters=True)  # a log is no place for clients' words
    event.listen(engine, "connect", partial(_set_up_sqlite, patience_s))
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _set_up_postgresql(patience_s: float, connection: Any, record: object) -> None:  # Any: psycopg's connection
    connection.execute(f"SET lock_timeout = {patience_s * 1000:.0f}")
    connection.commit()


def _set_up_sqlite(patience_s: float, connection: Any, record: object) -> None:  # Any: sqlite3's connection
    connection.isolation_level = None  # transactions are begun below, DDL's too
    for pragma in (f"busy_timeout={patience_s * 1000:.0f}", "journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    """With the right to write from the beginning: one that reads first and then writes could be refused midway."""
    connection.exec_driver_sql("BEGIN IMMEDIATE")


DATABASE, LOCK = "softprompt.db", "server.lock"
_OTHERS = stat.S_IRWXG | stat.S_IRWXO
_OF_A_NEW_DISK = "lost+found"

_log = logging.getLogger(__name__)


def make_private(folder: Path) -> None:
    """Make the folder with mode 0700, or take the rights of others from one that exists.

    Raises StorageError where it cannot be made or closed, or where it holds other things, which others may need.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        mode = stat.S_IMODE(folder.stat().st_mode)
    except OSError as error:
        reason = error.strerror or str(error)
        raise StorageError(f"cannot make the state folder {folder}: {reason}; choose another") from error
    if mode & _OTHERS:
        _close(folder, mode)


def _close(folder: Path, mode: int) -> None:
    found = f"the state folder {folder} is open to other users (mode {mode:04o})"
    try:
        if not _is_own(folder):
            raise StorageError(f"{found} and holds other things; name a folder of its own, or run chmod 700 on it")
        folder.chmod(mode & ~_OTHERS)
    except PermissionError as error:
        raise StorageError(f"{found}, and only its owner can close it; name a folder inside it") from error
    _log.warning("%s; it is closed to them now", found)


def _is_own(folder: Path) -> bool:
    """Whether it is a state folder already, or empty."""
    names = {path.name for path in folder.iterdir()}
    return bool(names & {DATABASE, LOCK}) or names <= {_OF_A_NEW_DISK}


_POSTGRESQL = "postgresql+psycopg"
_DRIVERS = {
    "sqlite": "sqlite",
    "postgres": _POSTGRESQL,
    "postgresql": _POSTGRESQL,
    _POSTGRESQL: _POSTGRESQL,
}


def database_url(text: str) -> URL:
    """The URL with the driver that we use. Raises ConfigError for one that is not SQLite's or PostgreSQL's."""
    try:
        url = make_url(text)
    except (ArgumentError, ValueError) as error:  # not shown: there may be a password in it
        raise ConfigError(f"the database's URL cannot be read; {_EXAMPLES}") from error
    if url.drivername not in _DRIVERS:
        raise ConfigError(f"the database's URL begins with {url.drivername}://, which is not served; {_EXAMPLES}")
    if url.drivername == "sqlite" and url.database in (None, "", ":memory:"):
        raise ConfigError("sqlite:// without a file keeps nothing; give sqlite:///FILE, four slashes for /FILE")
    if url.drivername != "sqlite" and importlib.util.find_spec("psycopg") is None:
        raise MissingDependencyError("PostgreSQL needs psycopg; pip install 'softprompt[postgresql]'")
    return url.set(drivername=_DRIVERS[url.drivername])


_EXAMPLES = "give sqlite:///FILE or postgresql://USER:PASSWORD@HOST/NAME"


_STUCK_S = 1.0  # a transaction that has waited so long for the file's lock: nobody joins it


class Transactions:
    """Any thread may use it."""

    def __init__(self, name: str, patience_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """`name`: the database's, for messages. `patience_s`: how long a transaction waits for others of ours."""
        self._name = name
        self._patience_s = patience_s
        self._clock = clock
        self._changed = threading.Condition()
        self._is_running = False
        self._waiting_since: float | None = None  # the running one, for the file's lock
        self._num_failures = 0

    @contextmanager
    def one(self) -> Iterator[Callable[[], None]]:
        """While one transaction runs; gives what to call when it has the file's lock.

        Raises DatabaseError where it cannot run soon.
        """
        self._enter()
        try:
            yield self._begun
        finally:
            self._leave()

    def _enter(self) -> None:
        with self._changed:
            self._check_not_stuck()
            failures, ends = self._num_failures, self._clock() + self._patience_s
            while self._is_running:
                is_over = not self._changed.wait(max(0.0, ends - self._clock())) and self._is_running
                if is_over or self._num_failures != failures:
                    raise self._locked()
            self._is_running, self._waiting_since = True, self._clock()

    def _begun(self) -> None:
        with self._changed:
            self._waiting_since = None

    def _leave(self) -> None:
        with self._changed:
            if self._waiting_since is not None:  # it never began
                self._num_failures += 1
            self._is_running, self._waiting_since = False, None
            self._changed.notify_all()

    def _check_not_stuck(self) -> None:
        if self._waiting_since is not None and self._clock() - self._waiting_since > _STUCK_S:
            raise self._locked()

    def _locked(self) -> DatabaseError:
        return DatabaseError(f"the database {self._name} is locked; another process or transaction holds it for long")

"""The database: SQLite in the state folder, or PostgreSQL by its URL. Any thread may use it."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, exc, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session, sessionmaker

from softprompt.config import ServerConfig
from softprompt.errors import DatabaseError, DataError, StorageError
from softprompt.server.state.migrate import migrate
from softprompt.server.state.urls import database_url

_DISK_FULL = "53100"  # PostgreSQL's word for it
_PATIENCE_S = 10  # for another's transaction (SQLite), for a connection (PostgreSQL)
_REFUSED_VALUES = (exc.DataError, UnicodeEncodeError, OverflowError)
_OF_STATEMENTS = (exc.IntegrityError, exc.ProgrammingError, exc.NotSupportedError)  # not of the database as a whole


class Database:
    """`with database.session() as session:` is one transaction, committed at its end or rolled back."""

    def __init__(self, url: str) -> None:
        """Opens it, and brings its tables to this release's form.

        Raises ConfigError for a URL that cannot be meant, DatabaseError where it does not answer or is of a newer
        release.
        """
        self.url = database_url(url)
        self.name = self.url.render_as_string()  # without its password
        self._is_open = False
        self._engine = _engine(self.url)
        try:
            with self._told_plainly():
                migrate(self._engine)
        except BaseException:
            self._engine.dispose()
            raise
        self._is_open = True
        self._sessions = sessionmaker(self._engine, expire_on_commit=False)

    @classmethod
    def in_folder(cls, folder: Path) -> Database:
        """SQLite in a state folder, which is made where it is missing. Raises StorageError where it cannot be."""
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # clients' files are nobody else's business
        except OSError as error:
            reason = error.strerror or str(error)
            raise StorageError(f"cannot make the state folder {folder}: {reason}; choose another") from error
        return cls(URL.create("sqlite", database=str(folder / "softprompt.db")).render_as_string())

    @classmethod
    def of(cls, config: ServerConfig) -> Database:
        """The one that the settings mean. Raises as the others do."""
        return cls.in_folder(Path(config.state)) if config.database is None else cls(config.database)

    @contextmanager
    def session(self) -> Iterator[Session]:
        """Raises DatabaseError where the database does not answer, DataError for a value that it cannot hold."""
        with self._told_plainly(), self._sessions.begin() as session:
            yield session

    @contextmanager
    def server_lock(self, number: int) -> Iterator[bool]:
        """PostgreSQL's lock of that number, for as long as this process has it: gives whether it does."""
        with self._told_plainly(), self._engine.connect() as connection:
            connection.execution_options(isolation_level="AUTOCOMMIT")  # no transaction that stays open
            try:
                yield bool(connection.scalar(text("SELECT pg_try_advisory_lock(:number)"), {"number": number}))
            finally:
                connection.invalidate()  # ends the session, and the lock with it

    def close(self) -> None:
        self._engine.dispose()

    @contextmanager
    def _told_plainly(self) -> Iterator[None]:
        """What the driver says, as an error of ours."""
        try:
            yield
        except _REFUSED_VALUES as error:
            raise DataError("the database cannot hold one of the values: too long, too large or no text") from error
        except DBAPIError as error:
            if self._is_open and isinstance(error, _OF_STATEMENTS):
                raise
            raise self._refusal(error) from error

    def _refusal(self, error: DBAPIError) -> DatabaseError:
        found = DatabaseError(f"the database {self.name} cannot be used: {_reason(error)}")
        found.errno = errno.ENOSPC if _is_full(error) else None
        return found


def _is_full(error: DBAPIError) -> bool:
    return "disk is full" in _reason(error) or getattr(error.orig, "sqlstate", None) == _DISK_FULL


def _reason(error: DBAPIError) -> str:
    return str(error.orig).strip().splitlines()[0]


def _engine(url: URL) -> Engine:
    if url.drivername != "sqlite":
        return create_engine(
            url, hide_parameters=True, pool_pre_ping=True, connect_args={"connect_timeout": _PATIENCE_S}
        )
    engine = create_engine(url, hide_parameters=True)  # a log is no place for clients' words
    event.listen(engine, "connect", _set_up_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _set_up_sqlite(connection: Any, record: object) -> None:  # Any: sqlite3's connection
    connection.isolation_level = None  # transactions are begun below, DDL's too
    for pragma in (f"busy_timeout={_PATIENCE_S * 1000}", "journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    """With the right to write from the beginning: one that reads first and then writes could be refused midway."""
    connection.exec_driver_sql("BEGIN IMMEDIATE")

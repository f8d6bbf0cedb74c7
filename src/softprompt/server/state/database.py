"""The database: SQLite in the state folder, or PostgreSQL by its URL. Any thread may use it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import create_engine, event
from sqlalchemy.orm import Session, sessionmaker

from softprompt.server.state.schema import Table


class Database:
    """`with database.session() as session:` is one transaction, committed at its end or rolled back."""

    def __init__(self, url: str) -> None:
        self._engine = create_engine(url)
        if self._engine.dialect.name == "sqlite":
            event.listen(self._engine, "connect", _set_up_sqlite)
        self._sessions = sessionmaker(self._engine, expire_on_commit=False)
        Table.metadata.create_all(self._engine)

    @classmethod
    def in_folder(cls, folder: Path) -> Database:
        """SQLite in a state folder, which is made where it is missing."""
        folder.mkdir(parents=True, exist_ok=True)
        return cls(f"sqlite:///{folder / 'softprompt.db'}")

    @contextmanager
    def session(self) -> Iterator[Session]:
        with self._sessions.begin() as session:
            yield session

    def close(self) -> None:
        self._engine.dispose()


def _set_up_sqlite(connection: Any, record: object) -> None:  # Any: sqlite3's connection
    for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON", "busy_timeout=10000"):
        connection.execute(f"PRAGMA {pragma}")

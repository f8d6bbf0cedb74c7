"""A state folder that others could read, a database that another process locks, and one that is replaced in use."""

from __future__ import annotations

import logging
import os
import sqlite3
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import httpx2
import pytest
from support.app_server import served
from support.tiny_bases import build_base

from softprompt.config import ServerConfig
from softprompt.errors import DatabaseError, StorageError
from softprompt.server.clients.keys import create_key, list_keys
from softprompt.server.start import serving_app
from softprompt.server.state.database import Database
from softprompt.server.state.lock import exclusive

PATIENCE_S = 1.0


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# The folder ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o701, 0o2775])
@pytest.mark.parametrize("has_database", [True, False])
def test_a_state_folder_that_is_open_to_others_is_closed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: int, has_database: bool
) -> None:
    state = tmp_path / "state"
    if has_database:
        Database.in_folder(state).close()
    state.mkdir(exist_ok=True)
    state.chmod(mode)
    with caplog.at_level(logging.WARNING):
        Database.in_folder(state).close()
    assert mode_of(state) & 0o777 == 0o700
    assert f"open to other users (mode {mode:04o})" in caplog.text


def test_a_new_state_folder_is_closed_whatever_the_umask(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = os.umask(0)
    try:
        Database.in_folder(tmp_path / "a" / "state").close()
        Database(f"sqlite:///{tmp_path / 'own.db'}").close()
    finally:
        os.umask(before)
    assert mode_of(tmp_path / "a" / "state") == 0o700
    assert mode_of(tmp_path / "own.db") == mode_of(tmp_path / "a" / "state" / "softprompt.db") == 0o600
    assert caplog.text == ""


def test_an_open_folder_that_holds_other_things_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    (shared / "thesis.txt").write_text("of somebody else")
    with pytest.raises(StorageError, match=r"mode 1777\) and holds other things; name a folder of its own"):
        Database.in_folder(shared)
    elsewhere = Database(f"sqlite:///{tmp_path / 'own.db'}")
    with pytest.raises(StorageError, match="holds other things"), exclusive(shared, elsewhere):
        pass
    elsewhere.close()
    assert mode_of(shared) == 0o1777 and [path.name for path in shared.iterdir()] == ["thesis.txt"]


def test_an_open_folder_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, mode: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    state = tmp_path / "state"
    state.mkdir()
    state.chmod(0o750)
    monkeypatch.setattr(Path, "chmod", refuse)
    with pytest.raises(StorageError, match=r"mode 0750\), and only its owner can close it; name a folder inside it"):
        Database.in_folder(state)


# The lock ------------------------------------------------------------------------------------------------------------


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """While another process would hold the right to write."""
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")


def timed_failures(database: Database, count: int) -> list[float]:
    """Seconds that each of so many threads, begun at once, takes to be refused."""
    found: list[float] = []

    def ask() -> None:
        began = time.monotonic()
        with pytest.raises(DatabaseError):
            list_keys(database)
        found.append(time.monotonic() - began)

    threads = [threading.Thread(target=ask) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(found) == count
    return found


def test_transactions_that_wait_for_a_locked_database_fail_together(tmp_path: Path) -> None:
    """Each once waited its whole time behind the one before; fifteen had connections, and the rest threads."""
    path = tmp_path / "a.db"
    database = Database(f"sqlite:///{path}", patience_s=PATIENCE_S)
    with locked(path):
        seconds = timed_failures(database, 40)
        assert max(seconds) < PATIENCE_S + 1 and min(seconds) > PATIENCE_S - 0.7
    assert list_keys(database) == []  # as soon as it is free
    database.close()


@pytest.mark.medium
def test_a_transaction_during_a_stuck_one_is_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    database = Database(f"sqlite:///{path}", patience_s=4)
    with locked(path):
        first = threading.Thread(target=timed_failures, args=(database, 1))
        first.start()
        time.sleep(1.3)
        assert max(timed_failures(database, 5)) < 0.5
        first.join(20)
    database.close()


def test_a_short_lock_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    database = Database(f"sqlite:///{path}", patience_s=10)
    found: list[int] = []
    with locked(path):
        threads = [threading.Thread(target=lambda: found.append(len(list_keys(database)))) for _ in range(10)]
        for thread in threads:
            thread.start()
        time.sleep(0.3)
    for thread in threads:
        thread.join(20)
    assert found == [0] * 10
    database.close()


# The file ------------------------------------------------------------------------------------------------------------


def test_a_database_that_is_removed_or_replaced_in_use_is_noticed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Writes once went on into a file without a name, and were gone with the process."""
    state = tmp_path / "state"
    database = Database.in_folder(state)
    _, secret = create_key(database, "ann")
    database.close()
    path, aside = state / "softprompt.db", state / "aside.db"
    header = {"Authorization": f"Bearer {secret}"}
    with served(serving_app(build_base(), ServerConfig(state=str(state), require_keys=True))) as url:

        def statuses(after_s: float = 1.1) -> tuple[int, int, int]:
            time.sleep(after_s)  # keys are read again once a second
            asked = (httpx2.get(f"{url}{place}", headers=header) for place in ("/ready", "/v1/files", "/v1/models"))
            return tuple(answer.status_code for answer in asked)  # type: ignore[return-value]

        assert statuses(0) == (200, 200, 200)
        path.rename(aside)
        assert statuses() == (503, 503, 503)
        assert "database's file" in httpx2.get(f"{url}/ready").json()["status"]
        path.write_bytes(aside.read_bytes())
        assert statuses(0) == (503, 503, 503)
        assert "was replaced or removed while it was in use; restart the server" in caplog.text
        assert str(state) not in httpx2.get(f"{url}/v1/files", headers=header).text
        aside.replace(path)
        assert statuses(0) == (200, 200, 200)

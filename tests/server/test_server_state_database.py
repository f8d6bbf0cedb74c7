"""The database: its tables are those that the migrations make, on SQLite and on a real PostgreSQL; what cannot be used
is refused in one sentence."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine, func, inspect, select, text
from sqlalchemy.exc import IntegrityError
from support.postgres_server import postgres

from softprompt.errors import ConfigError, DatabaseError, DataError, StorageError
from softprompt.server.clients.keys import (
    Client,
    Limits,
    clients_by_hash,
    create_key,
    has_keys,
    hash_of,
    keys_version,
    list_keys,
    revoke_key,
)
from softprompt.server.errors import ApiError
from softprompt.server.jobs.files import Files, Upload
from softprompt.server.state import migrations
from softprompt.server.state.database import Database, database_url
from softprompt.server.state.lock import exclusive
from softprompt.server.state.schema import FileRow, JobEventRow, JobRow, Table


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    with postgres() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty database."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'a b%c.db'}"
        return
    cluster = request.getfixturevalue("cluster")
    name = f"t{time.monotonic_ns()}"
    engine = create_engine(database_url(cluster), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    engine.dispose()
    yield cluster.removesuffix("postgres") + name


@pytest.fixture
def database(url: str) -> Iterator[Database]:
    opened = Database(url)
    yield opened
    opened.close()


def job_row(id_: str) -> JobRow:
    return JobRow(id=id_, owner="o", status="queued", model="base", suffix=None, training_file="f",
                  validation_file=None, settings={"n": [1.5, None, "ü\ud7ff"]}, outcome={}, fine_tuned_model=None,
                  created=1.25, started=None, finished=None)  # fmt: skip


def differences(url: str) -> list[object]:
    engine = create_engine(database_url(url))
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        found: list[object] = compare_metadata(context, Table.metadata)
    engine.dispose()
    return found


def test_the_migrations_make_the_tables_of_the_schema(database: Database, url: str) -> None:
    assert differences(url) == []
    with database.session() as session:
        session.execute(text("ALTER TABLE files DROP COLUMN sha256"))
    assert differences(url) != []  # the comparison sees what is missing


def test_rows_are_there_after_the_database_is_opened_again(database: Database, url: str) -> None:
    with database.session() as session:
        session.add(job_row("ftjob-1"))
        session.flush()
        events = [JobEventRow(id=f"e{index}", job="ftjob-1", created=2.0**40 + 0.5, level="info", kind="message",
                              message="", data={}) for index in range(3)]  # fmt: skip
        session.add_all(events)
    database.close()
    again = Database(url)
    with again.session() as session:
        row = session.get_one(JobRow, "ftjob-1")
        assert row.settings == {"n": [1.5, None, "ü\ud7ff"]}
        assert row.created == 1.25
        assert [event.number for event in session.scalars(select(JobEventRow).order_by(JobEventRow.number))] == [
            1,
            2,
            3,
        ]
        session.delete(row)
        session.flush()
        assert session.scalar(select(func.count()).select_from(JobEventRow)) == 0  # they go with their job
    again.close()


def test_a_failed_transaction_leaves_nothing(database: Database) -> None:
    def write_twice() -> None:
        with database.session() as session:
            session.add(job_row("ftjob-1"))
            session.flush()
            session.execute(text("INSERT INTO jobs SELECT * FROM jobs"))

    with pytest.raises(IntegrityError):
        write_twice()
    with database.session() as session:
        assert session.scalar(select(func.count()).select_from(JobRow)) == 0


@pytest.mark.parametrize("value", ["half \ud800 of a pair", 2**70])
def test_a_value_that_no_database_holds_is_bad_data(database: Database, value: object) -> None:
    with pytest.raises(DataError, match="cannot hold"), database.session() as session:
        session.execute(select(FileRow).where(FileRow.num_bytes == value if isinstance(value, int) else
                                              FileRow.id == value)).all()  # fmt: skip


def test_threads_that_read_and_write_wait_for_each_other(database: Database) -> None:
    """On SQLite a transaction that has read could not begin to write after another one has written."""
    with database.session() as session:
        session.add(job_row("ftjob-1"))
    failures: list[BaseException] = []

    def count_up() -> None:
        try:
            for _ in range(10):
                with database.session() as session:
                    row = session.get_one(JobRow, "ftjob-1", with_for_update=True)
                    row.outcome = {"count": row.outcome.get("count", 0) + 1}
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=count_up) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    with database.session() as session:
        assert session.get_one(JobRow, "ftjob-1").outcome == {"count": 40}


def test_requests_that_wait_for_anothers_lock_fail_in_bounded_time(url: str) -> None:
    """PostgreSQL once waited as long as the lock lasted."""
    patience_s, seconds = 0.5, []
    database = Database(url, patience_s)
    engine = create_engine(database_url(url), isolation_level="AUTOCOMMIT")
    is_sqlite = engine.dialect.name == "sqlite"

    def ask() -> None:
        began = time.monotonic()
        with pytest.raises(DatabaseError):
            list_keys(database)
        seconds.append(time.monotonic() - began)

    with engine.connect() as other:
        other.exec_driver_sql("BEGIN IMMEDIATE" if is_sqlite else "BEGIN")
        if not is_sqlite:
            other.exec_driver_sql("LOCK TABLE keys IN ACCESS EXCLUSIVE MODE")
        threads = [threading.Thread(target=ask) for _ in range(30)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        other.exec_driver_sql("ROLLBACK")
    engine.dispose()
    assert len(seconds) == 30 and max(seconds) < 2 * patience_s + 1  # a connection, and the lock
    assert list_keys(database) == []
    database.close()


def test_a_database_of_a_newer_release_is_refused(database: Database, url: str) -> None:
    with database.session() as session:
        session.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(DatabaseError, match=r"newer release of softprompt .*'9999'"):
        Database(url)


def test_a_database_with_foreign_tables_of_our_names_is_refused_unchanged(url: str) -> None:
    engine = create_engine(database_url(url))
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE keys (id INTEGER)"))
        connection.execute(text("CREATE TABLE recipes (id INTEGER)"))
    with pytest.raises(DatabaseError, match=r"did not make \(keys\)"):
        Database(url)
    assert set(inspect(engine).get_table_names()) == {"keys", "recipes"}
    engine.dispose()


def test_a_migration_that_fails_leaves_the_database_as_it_was(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(migrations.command, "upgrade", _upgrade_and_fail(migrations.command.upgrade))
    with pytest.raises(ZeroDivisionError):
        Database(url)
    engine = create_engine(database_url(url))
    assert inspect(engine).get_table_names() == []
    engine.dispose()
    monkeypatch.undo()
    Database(url).close()
    assert differences(url) == []


def _upgrade_and_fail(upgrade):  # type: ignore[no-untyped-def]
    def both(*arguments):  # type: ignore[no-untyped-def]
        upgrade(*arguments)
        raise ZeroDivisionError

    return both


_OPEN = """
import sys, time
from softprompt.server.state import migrations
from softprompt.server.state.database import Database
sys.stdin.read()
Database(sys.argv[1]).close()
"""


def test_files_and_keys_are_stored_alike_in_both_databases(database: Database, tmp_path: Path) -> None:
    files, alice = Files(database, tmp_path / "files", 2**20), Client(id="key-a")
    ids = [files.new_id() for _ in range(5)]
    for id_ in ids:
        files.arriving(id_).write_text('{"text": "x"}')
        files.add(id_, Upload({"purpose": "fine-tune"}, "ü" * 1000, 13, "0" * 64), alice)
    first, has_more = files.list(alice, limit=3, newest_first=False)
    rest, ends = files.list(alice, limit=3, newest_first=False, after=first[-1].id)
    assert ([file.id for file in first + rest], has_more, ends) == (ids, True, False)
    files.delete(ids[0], alice)
    for id_, client in ((ids[0], alice), ("\0", alice), ("file-\ud800", alice), (ids[1], Client(id="key-b"))):
        with pytest.raises(ApiError, match="there is no file"):
            files.get(id_, client)
    assert files.list(alice, limit=9, newest_first=True)[0][-1].filename == "ü" * 255
    before = keys_version(database)
    key, secret = create_key(database, "alice", limits=Limits(max_jobs=2))
    assert clients_by_hash(database)[hash_of(secret)].limits == Limits(max_jobs=2)
    assert revoke_key(database, key.id).revoked is not None
    assert (has_keys(database), clients_by_hash(database), keys_version(database) == before) == (False, {}, False)


@pytest.mark.medium
def test_processes_that_start_together_migrate_in_turn(url: str) -> None:
    processes = [subprocess.Popen([sys.executable, "-c", _OPEN, url], stdin=subprocess.PIPE, stderr=subprocess.PIPE)
                 for _ in range(4)]  # fmt: skip
    time.sleep(1.5)  # for their imports: then they all open it at once
    for process in processes:
        assert process.stdin is not None
        process.stdin.close()
    for process in processes:
        process.wait(60)
        assert process.stderr is not None
        assert (process.returncode, process.stderr.read()) == (0, b"")
        process.stderr.close()
    assert differences(url) == []


def test_one_server_works_on_a_database(database: Database, url: str, tmp_path: Path) -> None:
    other = Database(url)
    with exclusive(tmp_path / "one", database):
        with (
            pytest.raises(StorageError, match="another server works on the database"),
            exclusive(tmp_path / "two", other),
        ):
            pass
        create_key(other, "while it serves")
    with exclusive(tmp_path / "two", other):
        assert len(list_keys(database)) == 1
    other.close()


def test_one_server_works_on_a_state_folder(tmp_path: Path) -> None:
    one, two = (Database(f"sqlite:///{tmp_path / name}") for name in ("one.db", "two.db"))
    state = tmp_path / "state"
    refusal = pytest.raises(StorageError, match="another server works on the state folder")
    with exclusive(state, one), refusal, exclusive(state, two):
        pass
    with exclusive(state, two):
        pass
    one.close()
    two.close()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("mysql://u:secret@h/x", "begins with mysql://"),
        ("no url", "cannot be read"),
        ("sqlite://", "keeps nothing"),
        ("postgresql://u:secret@h:port/x", "cannot be read"),
    ],
)
def test_a_url_that_cannot_be_meant_is_refused_without_its_password(url: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refusal:
        Database(url)
    assert "secret" not in str(refusal.value)


def test_both_names_of_postgresql_are_known() -> None:
    for url in ("postgres://u:p@h/x", "postgresql://u:p@h/x", "postgresql+psycopg://u:p@h/x"):
        assert database_url(url).drivername == "postgresql+psycopg"


def test_a_database_that_cannot_be_opened_is_refused_in_one_sentence(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("no database" * 100)
    for url in ("postgresql://u:secret@127.0.0.1:1/x", f"sqlite:///{tmp_path}/none/a.db", f"sqlite:///{file}"):
        with pytest.raises(DatabaseError, match="cannot be used: ") as refusal:
            Database(url)
        assert "secret" not in str(refusal.value)
        assert "\n" not in str(refusal.value)
    with pytest.raises(StorageError, match=f"cannot make the state folder {file}/state"):
        Database.in_folder(file / "state")

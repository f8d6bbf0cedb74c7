"""Who asks: keys over HTTP, known and refused while the server runs; each client sees what is its own."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest
from sqlalchemy import Engine, event
from support.app_server import served
from support.memory import kept_bytes
from support.tiny_bases import build_base

from softprompt.config import EngineConfig, ServerConfig
from softprompt.errors import ConfigError, DatabaseError
from softprompt.server.clients.auth import check_listening, is_loopback
from softprompt.server.clients.keys import OPERATOR, KeyCache, create_key, revoke_key
from softprompt.server.errors import ApiError
from softprompt.server.start import serving_app
from softprompt.server.state.database import Database

_OPEN = {"/", "/version", "/health", "/ready"}  # asked by what watches the server; they tell nothing of anybody
_ROW = ("rows.jsonl", b'{"text": "w5 w6"}\n')


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state")


@pytest.fixture(scope="module")
def database(state: Path) -> Iterator[Database]:
    opened = Database.in_folder(state)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def admin(database: Database) -> str:
    return create_key(database, "root", is_admin=True)[1]


@pytest.fixture(scope="module")
def app(state: Path, admin: str) -> Any:  # Any: a FastAPI app
    return serving_app(build_base(), ServerConfig(state=str(state), require_keys=True), EngineConfig(max_rows=2))


@pytest.fixture(scope="module")
def url(app: Any) -> Iterator[str]:  # Any: a FastAPI app
    with served(app) as place:
        yield place


def client(url: str, key: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)


def test_no_route_answers_without_a_key(app: Any, url: str) -> None:  # Any: a FastAPI app
    paths = app.openapi()["paths"]
    assert {"/v1/files", "/v1/models", "/v1/completions", "/v1/fine_tuning/jobs", "/metrics"} <= set(paths)
    for path, methods in paths.items():
        for method in methods:
            answer = httpx.request(method, url + re.sub(r"\{[^}]*\}", "x", path))
            assert (answer.status_code == 401) == (path not in _OPEN), (method, path, answer.text)
            if answer.status_code == 401:
                assert answer.headers["WWW-Authenticate"] == "Bearer"
                assert answer.json()["error"]["type"] == "authentication_error"


@pytest.mark.parametrize("header", ["Bearer", "Bearer sp-wrong", "Basic c3A6", "Bearer \xff\xfe", "sp-"])
def test_a_wrong_key_is_refused(url: str, header: str) -> None:
    answer = httpx.get(f"{url}/v1/models", headers=[(b"authorization", header.encode("latin-1"))])
    assert answer.status_code == 401
    with pytest.raises(openai.AuthenticationError):
        client(url, "sp-" + "A" * 43).models.list()


def test_a_new_key_is_known_and_a_revoked_one_refused_within_two_seconds(url: str, database: Database) -> None:
    client(url, create_key(database, "before")[1])
    key, secret = create_key(database, "new")
    asks = client(url, secret)
    assert _seconds_until(lambda: asks.models.list(), openai.AuthenticationError, wanted=False) < 2
    revoke_key(database, key.id)
    assert _seconds_until(lambda: asks.models.list(), openai.AuthenticationError, wanted=True) < 2


def _seconds_until(act: Any, error: type[Exception], *, wanted: bool) -> float:  # Any: called without arguments
    began = time.monotonic()
    while time.monotonic() - began < 10:
        try:
            act()
            is_refused = False
        except error:
            is_refused = True
        if is_refused == wanted:
            break
        time.sleep(0.05)
    return time.monotonic() - began


def test_another_clients_file_is_answered_like_one_that_never_was(url: str, database: Database) -> None:
    alice, bob = (client(url, create_key(database, name)[1]) for name in ("alice", "bob"))
    _seconds_until(bob.models.list, openai.AuthenticationError, wanted=False)
    file = alice.files.create(file=_ROW, purpose="fine-tune")
    assert [each.id for each in alice.files.list()] == [file.id]
    assert list(bob.files.list()) == []
    never = "file-" + "0" * 32
    acts = (bob.files.retrieve, bob.files.delete, bob.files.content, lambda id_: bob.files.list(after=id_).data,
            lambda id_: bob.fine_tuning.jobs.create(training_file=id_, model="base"))  # fmt: skip
    for act in acts:
        assert _refusal(act, file.id).replace(file.id, never) == _refusal(act, never)
    assert alice.files.content(file.id).content == _ROW[1]


def _refusal(act: Any, file_id: str) -> str:  # Any: called with an id
    with pytest.raises(openai.NotFoundError) as refusal:
        act(file_id)
    return str(refusal.value)


def test_an_admins_routes_refuse_others(url: str, database: Database, admin: str) -> None:
    _, secret = create_key(database, "carol")
    carol = client(url, secret)
    _seconds_until(carol.models.list, openai.AuthenticationError, wanted=False)
    headers = [{"Authorization": f"Bearer {key}"} for key in (secret, admin)]
    assert [httpx.get(f"{url}/metrics", headers=header).status_code for header in headers] == [403, 200]


async def _name_or_status(keys: KeyCache, secret: str | None) -> int | str:
    try:
        return (await keys.client(secret)).name
    except ApiError as refusal:
        return refusal.status


@pytest.fixture
def statements(database: Database) -> Iterator[list[str]]:
    seen: list[str] = []

    def note(connection: Any, cursor: Any, statement: str, *rest: Any) -> None:  # Any: as SQLAlchemy calls it
        seen.append(statement)

    event.listen(Engine, "before_cursor_execute", note)
    yield seen
    event.remove(Engine, "before_cursor_execute", note)


def test_guessing_neither_asks_the_database_nor_fills_the_memory(database: Database, statements: list[str]) -> None:
    now = [0.0]
    keys = KeyCache(database, asks=True, clock=lambda: now[0])
    _, secret = create_key(database, "dave")

    async def guess() -> None:
        assert await _name_or_status(keys, secret) == "dave"
        before = len(statements)
        for number in range(3_000):
            assert await _name_or_status(keys, f"sp-{number}") == 401
        assert len(statements) == before
        now[0] += 1.5
        answers = await asyncio.gather(*(_name_or_status(keys, f"sp-{number}") for number in range(100)))
        assert set(answers) == {401}
        assert len(statements) - before <= 3  # one look for all of them: BEGIN, and whether something has changed

    assert kept_bytes(lambda: asyncio.run(guess())) < 100_000  # three thousand hashes are more than 300,000


def test_a_lost_table_of_keys_is_503_and_lets_nobody_in(tmp_path: Path) -> None:
    database = Database.in_folder(tmp_path)
    keys = KeyCache(database, asks=True)
    with database.session() as session:
        session.connection().exec_driver_sql("DROP TABLE keys")
    with pytest.raises(DatabaseError) as failure:
        asyncio.run(_name_or_status(keys, "sp-x"))
    told = ApiError.of(failure.value)
    assert told.status == 503
    assert str(tmp_path) not in told.message
    database.close()


def test_without_keys_everybody_is_the_operator(database: Database) -> None:
    client_ = asyncio.run(KeyCache(database, asks=False).client(None))
    assert (client_.id, client_.is_admin) == (OPERATOR, True)


# Where a server may listen -----------------------------------------------------------------------------------------


def test_a_server_that_others_reach_needs_a_key(tmp_path: Path) -> None:
    database = Database.in_folder(tmp_path)
    check_listening(ServerConfig(), database)
    for config in (ServerConfig(host="0.0.0.0"), ServerConfig(host="example.org"), ServerConfig(require_keys=True)):
        with pytest.raises(ConfigError, match="there is none in the database"):
            check_listening(config, database)
    key, _ = create_key(database, "alice")
    check_listening(ServerConfig(host="0.0.0.0"), database)
    revoke_key(database, key.id)
    with pytest.raises(ConfigError, match="every request needs an API key"):
        check_listening(ServerConfig(host="0.0.0.0"), database)
    database.close()


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost", "LocalHost."])
def test_a_loopback_host_is_recognised(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize(
    "host", ["", "0.0.0.0", "::", "10.0.0.1", "localhost.example.org", "127.0.0.1.nip.io", "2130706433"]
)
def test_a_host_that_others_reach_is_not_loopback(host: str) -> None:
    assert not is_loopback(host)


@pytest.fixture(scope="module")
def open_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server without keys."""
    with served(serving_app(build_base(), ServerConfig(state=str(tmp_path_factory.mktemp("open"))))) as place:
        yield place


def test_our_own_page_and_every_program_are_answered(open_url: str) -> None:
    port = open_url.rsplit(":", 1)[1]
    for headers in ({}, {"Origin": open_url}, {"Host": f"localhost:{port}", "Origin": f"http://localhost:{port}"},
                    {"Host": f"[::1]:{port}"}):  # fmt: skip
        assert httpx.get(f"{open_url}/v1/models", headers=headers).status_code == 200, headers


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:9"},
        {"Origin": "http://localhost.evil.example"},
        {"Host": "evil.example"},
        {"Host": "evil.example:8000", "Origin": "http://evil.example:8000"},
        {"Host": "127.0.0.1.evil.example"},
        {"Host": "127.0.0.1@evil.example"},
        {"Host": "[::1"},
    ],
)
def test_another_web_page_is_refused_where_there_are_no_keys(open_url: str, headers: dict[str, str]) -> None:
    answer = httpx.post(f"{open_url}/v1/completions", headers=headers, json={"model": "base", "prompt": "w5"})
    assert answer.status_code in (400, 403)
    if answer.status_code == 403:
        assert answer.json()["error"]["code"] in ("foreign_host", "foreign_origin")


def test_another_web_page_with_a_key_is_answered(url: str, admin: str) -> None:
    headers = {"Origin": "https://app.example", "Host": "api.example", "Authorization": f"Bearer {admin}"}
    assert httpx.get(f"{url}/v1/models", headers=headers).status_code == 200

"""OpenAI's Files API, with its own client against a real server; no file is ever half there."""

from __future__ import annotations

import errno
import logging
import os
import re
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx2 as httpx
import openai
import pytest
from fastapi import FastAPI
from sqlalchemy import select
from support.app_server import open_to_all, served

from softprompt.errors import DatabaseError
from softprompt.server.app import create_app
from softprompt.server.clients.keys import Client
from softprompt.server.jobs import files as files_room
from softprompt.server.jobs.files import Files
from softprompt.server.jobs.files_routes import router
from softprompt.server.state.database import Database
from softprompt.server.state.schema import FileRow, JobRow

ROWS = b'{"prompt": "a", "completion": " b"}\n{"prompt": "c", "completion": " d"}\n'
MAX_BYTES = 3 * 2**20


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    opened = Database.in_folder(tmp_path_factory.mktemp("state"))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def files(database: Database, tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(database, tmp_path_factory.mktemp("files"), MAX_BYTES)


@pytest.fixture(scope="module")
def app(files: Files, database: Database) -> FastAPI:
    return create_app((files, *open_to_all(database)), (router,))


@pytest.fixture(scope="module")
def url(app: FastAPI) -> Iterator[str]:
    with served(app) as place:
        yield f"{place}/v1"


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return connected(url)


def connected(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key="none", max_retries=0)


@pytest.fixture(autouse=True)
def nothing_is_left(files: Files, database: Database) -> Iterator[None]:
    """After every test folder and database agree, and no part of an upload lies about; then both are emptied."""
    yield
    with database.session() as session:
        rows = list(session.scalars(select(FileRow)))
        assert {path.name for path in files.folder.iterdir()} == {f"{row.id}.jsonl" for row in rows}
        for row in rows:
            assert (files.folder / f"{row.id}.jsonl").stat().st_size == row.num_bytes
            (files.folder / f"{row.id}.jsonl").unlink()
            session.delete(row)


def upload(client: openai.OpenAI, content: bytes = ROWS, name: str = "rows.jsonl") -> Any:  # Any: a FileObject
    return client.files.create(file=(name, content), purpose="fine-tune")


def test_a_file_is_uploaded_read_and_deleted(client: openai.OpenAI, files: Files) -> None:
    file = upload(client)
    assert re.fullmatch(r"file-[0-9a-f]{32}", file.id)
    assert (file.object, file.bytes, file.filename, file.purpose) == ("file", len(ROWS), "rows.jsonl", "fine-tune")
    assert (file.status, file.num_rows, file.form) == ("processed", 2, "template")
    assert abs(file.created_at - time.time()) < 60
    assert client.files.retrieve(file.id) == file
    assert client.files.wait_for_processing(file.id).status == "processed"
    assert client.files.content(file.id).content == ROWS
    assert files.get(file.id, Client()).path.read_bytes() == ROWS
    assert client.files.delete(file.id).deleted
    for act in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError, match="there is no file"):
            act(file.id)


def test_a_file_that_takes_many_pieces_arrives_whole(client: openai.OpenAI) -> None:
    content = b"".join(b'{"text": "%s %d"}\n' % (b"x" * 50_000, number) for number in range(50))
    file = upload(client, content)
    assert (file.bytes, file.num_rows, file.form) == (len(content), 50, "plain")
    assert client.files.content(file.id).content == content


def test_files_are_listed_in_pages(client: openai.OpenAI) -> None:
    made = [upload(client).id for _ in range(5)]
    assert [file.id for file in client.files.list()] == made[::-1]
    assert [file.id for file in client.files.list(limit=2)] == made[::-1]  # the client turns the pages
    assert [file.id for file in client.files.list(limit=2, order="asc")] == made
    page = client.files.list(limit=2, after=made[3])
    assert [file.id for file in page.data] == [made[2], made[1]]
    assert page.has_more
    assert not client.files.list(limit=2, order="asc", after=made[2]).has_more
    assert client.files.list(purpose="batch").data == []
    assert len(client.files.list(purpose="fine-tune").data) == 5


@pytest.mark.parametrize("query", ["limit=0", "limit=x", "limit=10001", "order=up"])
def test_an_impossible_page_is_refused(url: str, query: str) -> None:
    answer = httpx.get(f"{url}/files?{query}")
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == query.split("=")[0]


@pytest.mark.parametrize("id_", ["x", "file-%00", "..%2f..%2fetc%2fpasswd", "file-" + "0" * 32, "x" * 10_000, "%ff"])
def test_an_id_that_is_none_is_404(url: str, id_: str) -> None:
    for method, path in (("GET", id_), ("DELETE", id_), ("GET", f"{id_}/content")):
        answer = httpx.request(method, f"{url}/files/{path}")
        assert answer.status_code == 404
        assert len(answer.text) < 20_000
    assert httpx.get(f"{url}/files?after={id_}").status_code == 404


@pytest.mark.parametrize(
    "name",
    ["../../x.jsonl", "/etc/passwd", "a\0b", "x" * 10_000, "..", "CON", 'a"b\r\nX: y', "ü\u202egnp.jsonl", "%00"],
)
def test_a_hostile_file_name_is_kept_as_text(client: openai.OpenAI, files: Files, name: str) -> None:
    before = set(files.folder.parent.rglob("*"))
    file = upload(client, name=name)
    assert 0 < len(file.filename) <= 255
    assert "\0" not in file.filename
    assert client.files.retrieve(file.id).filename == file.filename
    assert client.files.content(file.id).response.headers["content-disposition"].endswith(f'"{file.id}.jsonl"')
    assert set(files.folder.parent.rglob("*")) - before == {files.folder / f"{file.id}.jsonl"}


def test_broken_rows_are_refused_by_line(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="line 2 is not JSON") as refusal:
        upload(client, ROWS[:36] + b"{\n" + ROWS)
    assert refusal.value.code == "invalid_data"


def test_another_purpose_than_fine_tune_is_refused(client: openai.OpenAI, url: str) -> None:
    with pytest.raises(openai.BadRequestError, match="purpose is 'batch'; it must be 'fine-tune'"):
        client.files.create(file=("x", ROWS), purpose="batch")
    with pytest.raises(openai.BadRequestError, match="files are kept until they are deleted"):
        client.files.create(
            file=("x", ROWS), purpose="fine-tune", expires_after={"anchor": "created_at", "seconds": 3600}
        )
    answer = httpx.post(f"{url}/files", files={"file": ("x", ROWS)})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "purpose")


def test_a_file_that_is_too_large_is_refused(client: openai.OpenAI) -> None:
    line = b'{"text": "%s"}' % (b"x" * (MAX_BYTES - 12))
    with pytest.raises(openai.APIStatusError, match="larger than 3,145,728 bytes") as refusal:
        upload(client, line + b"\n")
    assert refusal.value.status_code == 413
    assert upload(client, line).bytes == MAX_BYTES


BOUNDARY = "multipart/form-data; boundary=b"
HEAD = b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
FILE = b'--b\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n' + ROWS + b"\r\n"
END = b"--b--\r\n"


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("application/json", b"{}"),
        ("", HEAD + FILE + END),
        ("multipart/form-data", HEAD + FILE + END),
        ("multipart/form-data; boundary=" + "b" * 10_000, HEAD + FILE + END),
        (BOUNDARY, b""),
        (BOUNDARY, b"no form"),
        (BOUNDARY, HEAD + FILE),
        (BOUNDARY, HEAD + FILE[:-20]),
        (BOUNDARY, HEAD + END),
        (BOUNDARY, HEAD + FILE + FILE + END),
        (BOUNDARY, HEAD.replace(b"fine-tune", b"x" * 10_000) + FILE + END),
        (BOUNDARY, b"".join(HEAD.replace(b"purpose", b"f%d" % index) for index in range(100)) + FILE + END),
        (BOUNDARY, HEAD.replace(b"Content", b"X" * 100_000) + FILE + END),
    ],
)
def test_a_malformed_form_is_refused(url: str, content_type: str, body: bytes) -> None:
    answer = httpx.post(f"{url}/files", content=body, headers={"Content-Type": content_type})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["message"]


def test_the_whole_form_of_these_tests_is_accepted(url: str) -> None:
    answer = httpx.post(f"{url}/files", content=HEAD + FILE + END, headers={"Content-Type": BOUNDARY})
    assert answer.status_code == 200, answer.text


def test_an_upload_that_breaks_off_leaves_no_file(url: str, files: Files) -> None:
    host, port = url.removeprefix("http://").removesuffix("/v1").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST /v1/files HTTP/1.1\r\nHost: x\r\nContent-Type: {BOUNDARY}\r\nContent-Length: 1000000\r\n\r\n"
        connection.sendall(head.encode() + HEAD + FILE[:80])
        _until(lambda: list(files.folder.iterdir()))
        (partial,) = files.folder.iterdir()
        assert partial.name.startswith(".file-")
    _until(lambda: not list(files.folder.iterdir()))


def _until(holds: Any) -> None:  # Any: called without arguments
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# What fails midway -------------------------------------------------------------------------------------------------


def test_a_full_disk_is_507_and_leaves_no_file(client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:  # Any: as os.fsync takes them
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as broken:
        broken.setattr(files_room.os, "fsync", full)
        with pytest.raises(openai.APIStatusError, match="no space left") as refusal:
            upload(client)
        assert refusal.value.status_code == 507
    upload(client)


@pytest.mark.parametrize("name", ["sync_folder", "FileRow"])
def test_a_failure_between_file_and_row_leaves_neither(url: str, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    real = getattr(files_room, name)

    def fail(*arguments: Any, **more: Any) -> Any:  # Any: as the real one takes them
        if name == "FileRow":
            return real(**{**more, "owner": None})  # the database refuses it
        raise OSError(errno.EIO, "broken")

    with monkeypatch.context() as broken:
        broken.setattr(files_room, name, fail)
        with connected(url) as client, pytest.raises(openai.InternalServerError):
            upload(client)
    with connected(url) as client:
        upload(client)


def test_a_failed_deletion_keeps_file_and_row(
    files: Files, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = upload(client)
    with monkeypatch.context() as broken:
        broken.setattr(files_room, "delete", _raise_database_error)
        with pytest.raises(DatabaseError):
            files.delete(file.id, Client())
    assert client.files.content(file.id).content == ROWS


def _raise_database_error(*arguments: Any) -> None:  # Any: as SQLAlchemy's takes them
    raise DatabaseError("gone")


def job_row(number: int, status: str, training: str, validation: str) -> JobRow:
    return JobRow(id=f"ftjob-{number}", owner="", status=status, model="base", suffix=None, training_file=training,
                  validation_file=validation, settings={}, outcome={}, fine_tuned_model=None, created=0.0,
                  started=None, finished=None)  # fmt: skip


def test_a_file_that_a_job_needs_is_not_deleted(client: openai.OpenAI, database: Database) -> None:
    training, validation, free = (upload(client).id for _ in range(3))
    with database.session() as session:
        for number, status in enumerate(("succeeded", "paused")):
            session.add(job_row(number, status, training if number else free, validation))
    for file_id in (training, validation):
        with pytest.raises(openai.ConflictError, match="needed by job 'ftjob-1'"):
            client.files.delete(file_id)
        assert client.files.content(file_id).content == ROWS
    client.files.delete(free)


def test_a_start_removes_partial_uploads_and_deletions(
    files: Files, client: openai.OpenAI, database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    kept, lost, half_deleted = (upload(client).id for _ in range(3))
    (files.folder / f"{lost}.jsonl").unlink()
    os.replace(files.folder / f"{half_deleted}.jsonl", files.folder / f".{half_deleted}.deleted")
    (files.folder / f".file-{'a' * 32}.partial").write_bytes(b"half a fi")
    unknown, foreign = files.folder / f"file-{'b' * 32}.jsonl", files.folder / "notes.txt"
    unknown.write_bytes(ROWS)
    foreign.write_bytes(b"mine")
    with caplog.at_level(logging.WARNING):
        Files(database, files.folder, MAX_BYTES).clean()
    assert {path.name for path in files.folder.iterdir()} == {f"{kept}.jsonl", unknown.name, "notes.txt"}
    assert [file.id for file in client.files.list()] == [lost, kept]
    assert f"1 files are not in the database, and are left where they are: file-{'b' * 32}" in caplog.text
    assert f"1 files of the database are not in the folder; jobs that need them will fail: {lost}" in caplog.text
    with pytest.raises(openai.NotFoundError, match="is lost; upload it again"):
        client.files.content(lost)
    client.files.delete(lost)
    unknown.unlink()
    foreign.unlink()

"""A state folder on a disk that fills up: what cannot be kept is refused whole, what was kept is served, and when there
is room again everything goes on without a restart."""

from __future__ import annotations

import errno
import os
import signal
from io import RawIOBase
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import NoReturn

import httpx2
import pytest
from support.fault_server import Servers, can_mount, save_base
from support.fault_work import ROWS, Place, asked_job, outcome, trained
from support.prompt_server import as_upload, eventually, made_prompt, prompt_server, upload

from softprompt.base import Base, load_base

pytestmark = pytest.mark.medium
_LONG = {"epochs": 40}


def fill(disk: Path) -> Path:
    """To the last byte; deleting the file that is given makes room again."""
    with open(disk / "ballast", "wb", buffering=0) as file:
        for size in (2**16, 2**12, 1):
            with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
                _fill(file, bytes(size))
    return disk / "ballast"


def _fill(file: RawIOBase, piece: bytes) -> None:
    while True:
        file.write(piece)


def refused(answer: httpx2.Response, status: int, code: str) -> None:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["code"] == code and "/" not in error["message"], error


@pytest.mark.skipif(not can_mount(), reason="a small disk needs a mount namespace (unshare -Urm)")
def test_a_full_disk_refuses_writes_and_loses_nothing(servers: Servers, tmp_path: Path) -> None:
    folder, state = save_base(tmp_path / "base"), tmp_path / "state"
    base = load_base(str(folder), dtype="float32", device="cpu")
    state.mkdir()
    server = servers.start(folder, "--state", tmp_path / "elsewhere")
    at = Place.at(server.url)
    alone = trained(at, ROWS, **_LONG)
    at.close()
    servers.kill(server)

    server = servers.start(folder, "--state", state, disk=(state, "8m"))
    at, disk = Place.at(server.url), server.seen(state)
    file = at.openai.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune").id
    at.asked("POST", "/v1/prompts", data={"name": "kept"}, files=as_upload(made_prompt(base, 0)))
    before, job = at.answer("kept"), asked_job(at, file, **_LONG).id
    runs = at.openai.fine_tuning.jobs
    eventually(lambda: runs.retrieve(job).status == "running")
    ballast = fill(disk)

    rows = {"data": {"purpose": "fine-tune"}, "files": {"file": ("more.jsonl", ROWS)}}
    refused(at.http.post("/v1/files", **rows), 507, "no_space")
    new = {"data": {"name": "new"}, "files": as_upload(made_prompt(base, 1))}
    refused(at.http.post("/v1/prompts", **new), 507, "no_space")
    refused(at.http.post("/v1/prompts", **{**new, "data": {"name": "kept", "overwrite": "true"}}), 507, "no_space")
    refused(at.http.post("/v1/fine_tuning/jobs", json={"model": "kept", "training_file": file}), 507, "no_space")
    for number in range(1_000):
        answer = at.http.put(f"/v1/aliases/alias-{number}", json={"model": "kept"})
        if answer.status_code != 200:
            break
    refused(answer, 507, "no_space")
    assert at.answer("kept") == before
    assert at.openai.files.content(file).content == ROWS
    assert at.http.get("/ready").status_code == 200
    assert at.http.get(f"/v1/aliases/alias-{number}").status_code >= 400
    assert runs.retrieve(job).status in ("validating_files", "queued", "running", "paused")
    assert {path.name for path in disk.glob("*/.*")} == set()
    assert [each["id"] for each in at.asked("GET", "/v1/prompts")["data"] if each["source"] == "upload"] == ["kept"]

    ballast.unlink()
    eventually(lambda: at.http.put("/v1/aliases/alias", json={"model": "kept"}).status_code == 200)
    at.asked("POST", "/v1/files", **rows)
    at.asked("POST", "/v1/prompts", **new)
    if runs.retrieve(job).status == "paused":
        told = runs.list_events(job).data[0]
        assert "resume it when there is room" in told.message
        runs.resume(job)
    assert outcome(at, job) == alone
    assert at.answer("kept") == before and at.answer("alias") == before
    saved = {f"alias-{each}" for each in range(number)}  # what was acknowledged at the limit is there
    assert saved <= {each["id"] for each in at.asked("GET", "/v1/aliases")["data"]}
    at.close()
    assert servers.kill(server, signal.SIGTERM) == 0


def test_an_upload_that_finds_no_space_for_its_temporary_file_is_refused(
    tiny_llama: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large upload is a temporary file until it is whole."""

    def refuse(file: SpooledTemporaryFile[bytes], data: bytes) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with prompt_server(tiny_llama, tmp_path / "state") as room, room.client() as client:
        with monkeypatch.context() as change:
            change.setattr(SpooledTemporaryFile, "write", refuse)
            refused(upload(client, "new", made_prompt(tiny_llama)), 507, "no_space")
        assert upload(client, "new", made_prompt(tiny_llama)).status_code == 200

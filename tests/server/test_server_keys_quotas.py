"""How much a key may have the server keep: refused where it would pass, counted anew after a deletion and a restart."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx2
import pytest
from support.app_server import served
from support.prompt_server import as_upload, made_prompt
from support.tiny_bases import build_base

from softprompt.base import Base
from softprompt.config import ServerConfig
from softprompt.server.clients.keys import Client, Limits, create_key
from softprompt.server.clients.quotas import Amounts, Quotas
from softprompt.server.errors import ApiError
from softprompt.server.start import serving_app
from softprompt.server.state.database import Database

ROW = b'{"text": "w5 w6"}\n'
ANN = Client(id="key-1", is_admin=False)


@pytest.fixture(scope="module")
def base() -> Base:
    return build_base()


@contextmanager
def serving(base: Base, state: Path, **config: int) -> Iterator[str]:
    with served(serving_app(base, ServerConfig(state=str(state), require_keys=True, **config))) as url:
        yield url


def keys(state: Path, **limits: Limits) -> dict[str, str]:
    """A key for each name; root's is an admin's."""
    database = Database.in_folder(state)
    made = {
        name: create_key(database, name, is_admin=name == "root", limits=limit)[1] for name, limit in limits.items()
    }
    database.close()
    return made


def client(url: str, secret: str) -> httpx2.Client:
    return httpx2.Client(base_url=url, headers={"Authorization": f"Bearer {secret}"}, timeout=60)


def upload(http: httpx2.Client, data: bytes = ROW) -> httpx2.Response:
    return http.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("rows.jsonl", data)})


def add(http: httpx2.Client, base: Base, name: str, seed: int = 0, length: int = 4) -> httpx2.Response:
    prompt = made_prompt(base, seed, length)
    return http.post("/v1/prompts", data={"name": name, "overwrite": "true"}, files=as_upload(prompt))


def refusal(answer: httpx2.Response) -> str:
    assert answer.status_code == 403, answer.text
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("permission_error", "quota_exceeded")
    return str(error["message"])


def test_files_are_counted_after_deletions_and_a_restart(base: Base, tmp_path: Path) -> None:
    secrets = keys(tmp_path, ann=Limits(), bob=Limits(max_files=3), root=Limits())
    for _ in range(2):  # the second server finds what the first has left
        with serving(base, tmp_path, max_files=2) as url, client(url, secrets["ann"]) as ann:
            ids = [upload(ann).json()["id"] for _ in range(2 - len(ann.get("/v1/files").json()["data"]))]
            assert "has 2 files and may have 2" in refusal(upload(ann))
            for each in ids[:1]:
                ann.delete(f"/v1/files/{each}")
                assert upload(ann).status_code == 200
            assert "has 2 files" in refusal(upload(ann))
    with serving(base, tmp_path, max_files=2) as url:
        with client(url, secrets["bob"]) as bob:  # its own limit
            assert [upload(bob).status_code for _ in range(4)] == [200, 200, 200, 403]
        with client(url, secrets["root"]) as root:  # an admin, who has none
            assert [upload(root).status_code for _ in range(4)] == [200] * 4


def test_uploads_side_by_side_do_not_pass_the_limit_together(base: Base, tmp_path: Path) -> None:
    secrets = keys(tmp_path, ann=Limits(max_files=3, max_stored_bytes=10_000))
    data = ROW * 100
    with serving(base, tmp_path) as url, client(url, secrets["ann"]) as ann:
        with ThreadPoolExecutor(12) as threads:
            statuses = sorted(threads.map(lambda _: upload(ann, data).status_code, range(12)))
        assert statuses == [200] * 3 + [403] * 9
        assert len(ann.get("/v1/files").json()["data"]) == 3
        assert not list((tmp_path / "files").glob(".*"))


def test_bytes_are_those_of_files_and_prompts_together(base: Base, tmp_path: Path) -> None:
    one = made_prompt(base, length=4).num_bytes
    secrets = keys(tmp_path, ann=Limits(max_stored_bytes=2 * one + 10 * len(ROW)))
    with serving(base, tmp_path) as url, client(url, secrets["ann"]) as ann:
        assert add(ann, base, "a").status_code == add(ann, base, "b", 1).status_code == 200
        assert add(ann, base, "b", 2).status_code == 200  # in its place
        assert "bytes of files and prompts" in refusal(add(ann, base, "c", 3))
        assert "bytes" in refusal(upload(ann, ROW * 11))
        file = upload(ann, ROW * 10).json()["id"]
        assert "bytes" in refusal(upload(ann))
        assert "bytes" in refusal(add(ann, base, "b", 4, length=5))
        assert ann.delete(f"/v1/files/{file}").status_code == ann.delete("/v1/prompts/a").status_code == 200
        assert add(ann, base, "b", 4, length=5).status_code == 200
    with serving(base, tmp_path) as url, client(url, secrets["ann"]) as ann:
        assert "bytes" in refusal(add(ann, base, "c", 3, length=6))
        assert add(ann, base, "c", 3, length=5).status_code == 200


def test_prompts_aliases_and_jobs_to_come_are_counted(base: Base, tmp_path: Path) -> None:
    secrets = keys(tmp_path, ann=Limits(max_prompts=2), bob=Limits())
    with serving(base, tmp_path) as url, client(url, secrets["ann"]) as ann, client(url, secrets["bob"]) as bob:
        assert add(ann, base, "a").status_code == 200
        asked = {"model": "base", "training_file": upload(ann).json()["id"],
                 "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1000}}}}  # fmt: skip
        job = ann.post("/v1/fine_tuning/jobs", json=asked)
        assert job.status_code == 200, job.text
        assert "has 1 prompts and may have 2" in refusal(ann.post("/v1/fine_tuning/jobs", json=asked))
        ann.post(f"/v1/fine_tuning/jobs/{job.json()['id']}/cancel")
        for name in ("x", "y", "x"):  # once more is no new one
            assert ann.put(f"/v1/aliases/{name}", json={"model": "a"}).status_code == 200
        assert "has 2 aliases" in refusal(ann.put("/v1/aliases/z", json={"model": "a"}))
        assert ann.delete("/v1/aliases/y").status_code == 200
        assert ann.put("/v1/aliases/z", json={"model": "a"}).status_code == 200
        assert add(bob, base, "a").status_code == 200  # another's amounts are nobody else's


def test_a_reservation_counts_until_it_is_kept_or_refused() -> None:
    kept = Amounts(files=1, num_bytes=60)
    quotas = Quotas(Limits(max_files=3, max_stored_bytes=100), lambda owner: kept)
    one, two = quotas.reserve(ANN, Amounts(files=1)), quotas.reserve(ANN, Amounts(files=1))
    quotas.grow(one, 40)
    with pytest.raises(
        ApiError, match="has 100 bytes of files and prompts and may have 100, which leaves no room for 1"
    ):
        quotas.grow(two, 1)
    with pytest.raises(ApiError, match="has 3 files"):
        quotas.check(ANN, Amounts(files=1))
    quotas.check(replace(ANN, is_admin=True), Amounts(files=9))
    quotas.release(two, is_kept=False)
    kept = Amounts(files=2, num_bytes=100)  # one is written down, and still reserved
    three = quotas.reserve(ANN, Amounts(files=1))
    quotas.release(one, is_kept=True)
    with pytest.raises(ApiError, match="100 bytes"):
        quotas.grow(three, 1)
    quotas.release(three, is_kept=False)
    kept = Amounts(files=1, num_bytes=60)  # deleted
    quotas.check(ANN, Amounts(files=2, num_bytes=40))


def test_a_deletion_during_another_upload_makes_room() -> None:
    kept = Amounts(files=2)
    quotas = Quotas(Limits(max_files=3), lambda owner: kept)
    quotas.reserve(ANN, Amounts(files=1))
    with pytest.raises(ApiError, match="3 files"):
        quotas.check(ANN, Amounts(files=1))
    kept = Amounts(files=1)
    quotas.check(ANN, Amounts(files=1))


def test_reservations_of_many_threads_are_all_given_back() -> None:
    quotas, most = Quotas(Limits(max_files=5), lambda owner: Amounts()), threading.Semaphore(5)

    def work(_: int) -> None:
        try:
            with quotas.reserved(ANN, Amounts(files=1)):
                assert most.acquire(blocking=False), "more than five at once"
                most.release()
        except ApiError:
            pass

    with ThreadPoolExecutor(16) as threads:
        list(threads.map(work, range(300)))
    quotas.check(ANN, Amounts(files=5))

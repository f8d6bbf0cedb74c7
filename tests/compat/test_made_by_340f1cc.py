"""Everything that users of commit 340f1cc have on their disks loads and goes on: an adapter, an interrupted run, a
server's state on SQLite and on PostgreSQL. `make_340f1cc.py` has written them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from sqlalchemy import create_engine
from support.app_server import served
from support.command_line import succeed
from support.job_server import wait_until
from support.postgres_server import postgres
from support.tiny_bases import build_base

from softprompt.base import Base, load_base
from softprompt.config import ServerConfig
from softprompt.errors import WrongBaseError
from softprompt.prompt import SoftPrompt
from softprompt.server.start import serving_app
from softprompt.server.state.database import database_url
from softprompt.storage import RunFolder, load_prompt

MADE = Path(__file__).parent / "made_by_340f1cc"
EXPECTED = json.loads((MADE / "expected.json").read_text())
TRAIN = ("train", "--base", "base", "--virtual-tokens", 2, "--dtype", "float32", "--device", "cpu", "--batch-rows", 4)
TRAIN_AS_RUN = (
    *TRAIN, "--data", "texts.csv", "--text-column", "prompt", "--rows", 12, "--validation", 4, "--epochs", 4,
    "--micro-batch-rows", 4, "--save-every", 4, "--schedule", "cosine", "--relative-learning-rate", 0.1,
)  # fmt: skip
TRAIN_AS_JOB = (*TRAIN, "--data", "rows.jsonl", "--epochs", 30, "--seed", 1)


@pytest.fixture(scope="module")
def base() -> Base:
    return load_base(str(MADE / "base"), dtype="float32", device="cpu")


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """All of it, to write in."""
    return Path(shutil.copytree(MADE, tmp_path / "made"))


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in RunFolder(folder).read_metrics() if line["kind"] == "step"]


def assert_same_prompt(found: SoftPrompt, wanted: SoftPrompt, *, rounds_alike: bool) -> None:
    """To the bit where this machine rounds as the one did on which the first part was trained."""
    torch.testing.assert_close(found.tensor, wanted.tensor, rtol=1e-3, atol=1e-4)
    assert torch.equal(found.tensor, wanted.tensor) or not rounds_alike


def test_an_adapter_loads_with_its_record_on_its_own_base_only(base: Base) -> None:
    prompt = load_prompt(MADE / "adapter", base)
    assert prompt.tensor.shape == (2, base.hidden_size)
    assert prompt.content_hash == json.loads((MADE / "adapter" / "softprompt.json").read_text())["content_hash"]
    assert prompt.record.base_fingerprint == base.fingerprint
    assert (prompt.record.run["kept_step"], len(prompt.record.run["drift"])) == (8, 2)
    with pytest.raises(WrongBaseError):
        load_prompt(MADE / "adapter", build_base("llama", seed=1))


def test_an_interrupted_run_resumes_to_the_prompt_of_an_uninterrupted_one(copied: Path) -> None:
    before = losses(copied / "run")
    assert 0 < len(before) < 8
    assert "resumed after step" in succeed("train", "--resume", "--out", "run", cwd=copied).err
    succeed(*TRAIN_AS_RUN, "--out", "straight", cwd=copied)
    resumed, straight, old = (load_prompt(copied / name) for name in ("run", "straight", "adapter"))
    rounds_alike = losses(copied / "straight")[: len(before)] == before
    assert_same_prompt(resumed, straight, rounds_alike=rounds_alike)
    assert_same_prompt(resumed, old, rounds_alike=rounds_alike)
    assert [each.step for each in RunFolder(copied / "run").checkpoints()][-1] == 8


@dataclass(frozen=True)
class Served:
    """A server on the old state, and a client for each of its keys."""

    ada: httpx2.Client
    root: httpx2.Client


@pytest.fixture(params=["sqlite", "postgresql"])
def server(request: pytest.FixtureRequest, base: Base, copied: Path) -> Iterator[Served]:
    for name in ("kept", "gone"):
        shutil.copytree(copied / "adapter", copied / "library" / name)
    config = {"state": str(copied / "state"), "library": str(copied / "library"), "require_keys": True}
    if request.param == "postgresql":
        (copied / "state" / "softprompt.db").unlink()
        config["database"] = request.getfixturevalue("filled_postgresql")
    headers = {name: {"Authorization": f"Bearer {key}"} for name, key in EXPECTED["keys"].items()}
    with served(serving_app(base, ServerConfig(**config))) as url:
        clients = {name: httpx2.Client(base_url=url, headers=each, timeout=60) for name, each in headers.items()}
        yield Served(**clients)


@pytest.fixture
def filled_postgresql() -> Iterator[str]:
    with postgres() as url:
        engine = create_engine(database_url(url), isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.exec_driver_sql((MADE / "state.sql").read_text())
            connection.invalidate()  # the dump has changed the session's settings
        engine.dispose()
        yield url


def checked(response: httpx2.Response) -> Any:
    assert response.status_code == 200, response.text
    return response.json()


def answer(client: httpx2.Client, model: str) -> dict[str, Any]:
    body = {"model": model, "prompt": "w5 w9 w20", "max_tokens": 8, "temperature": 0, "logprobs": 2}
    choice = checked(client.post("/v1/completions", json=body))["choices"][0]
    return {"text": choice["text"], "token_logprobs": choice["logprobs"]["token_logprobs"]}


def test_a_servers_state_answers_as_before_and_its_paused_job_goes_on(server: Served, base: Base, copied: Path) -> None:
    answers = {model: answer(server.ada, model) for model in EXPECTED["answers"]}
    for model, found in answers.items():
        wanted = EXPECTED["answers"][model]
        assert found["text"] == wanted["text"]
        assert found["token_logprobs"] == pytest.approx(wanted["token_logprobs"], abs=1e-4)
    assert answers["coach"]["text"] == answers["helper"]["text"] != answers["base"]["text"]
    assert server.root.post("/v1/completions", json={"model": "coach", "prompt": "w5"}).status_code == 404

    prompts = {each["id"]: each for each in checked(server.ada.get("/v1/prompts"))["data"]}
    assert {name for name, each in prompts.items() if each["pinned"]} == {"coach", "kept"}
    assert prompts["coach"]["aliases"] == ["helper"]
    assert "gone" not in prompts
    assert checked(server.root.post("/v1/prompts/gone/load"))["source"] == "library"

    assert server.ada.get(f"/v1/files/{EXPECTED['file']}/content").content == (MADE / "rows.jsonl").read_bytes()
    jobs = "/v1/fine_tuning/jobs"
    finished, paused = EXPECTED["finished_job"], EXPECTED["paused_job"]
    found = checked(server.ada.get(f"{jobs}/{finished['id']}"))
    assert {name: found[name] for name in finished} == finished
    assert server.root.get(f"{jobs}/{finished['id']}").status_code == 404

    before = losses(copied / "state" / "jobs" / paused)
    assert 0 < len(before) < 60
    assert checked(server.ada.get(f"{jobs}/{paused}"))["status"] == "paused"
    assert checked(server.ada.post(f"{jobs}/{paused}/resume"))["status"] in ("queued", "validating_files", "running")
    wait_until(lambda: checked(server.ada.get(f"{jobs}/{paused}"))["status"] == "succeeded")
    succeed(*TRAIN_AS_JOB, "--out", "straight", cwd=copied)
    made, straight = (copied / "state" / "jobs" / paused, copied / "straight")
    rounds_alike = losses(straight)[: len(before)] == before
    assert_same_prompt(load_prompt(made), load_prompt(straight), rounds_alike=rounds_alike)
    assert answer(server.ada, checked(server.ada.get(f"{jobs}/{paused}"))["fine_tuned_model"])["text"]

"""What is being answered on a key ends soon after the key is revoked, and nobody else's."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from support.app_server import AppServer, serve_app, served
from support.job_server import LONG as LONG_JOB
from support.job_server import create_job, plain_rows, upload, wait_until
from support.tiny_bases import build_base

from softprompt.config import EngineConfig, ServerConfig
from softprompt.server.clients.keys import create_key, revoke_key
from softprompt.server.jobs import jobs as queue
from softprompt.server.start import serving_app
from softprompt.server.state.database import Database
from softprompt.server.state.schema import JobRow

LONG = 60_000  # tokens: some minutes


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    opened = Database.in_folder(tmp_path_factory.mktemp("state"))
    create_key(opened, "first")
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def place(database: Database) -> Iterator[AppServer]:
    base = build_base(max_position_embeddings=2 * LONG)
    config = ServerConfig(state=str(Path(str(database.url.database)).parent), require_keys=True)
    with serve_app(serving_app(base, config, EngineConfig(kv_bytes=2**32))) as found:
        yield found


@dataclass
class Answer:
    """One that is being read in a thread."""

    status: int = 0
    last: dict[str, Any] = field(default_factory=dict)  # Any: JSON
    ended: float = 0.0  # by the monotonic clock
    num_events: int = 0


def asking(url: str, secret: str, *, stream: bool) -> tuple[Answer, threading.Thread]:
    answer = Answer()

    def read() -> None:
        body = {"model": "base", "prompt": "w5", "max_tokens": LONG, "ignore_eos": True, "stream": stream}
        headers = {"Authorization": f"Bearer {secret}"}
        with httpx2.stream("POST", f"{url}/v1/completions", json=body, headers=headers, timeout=60) as found:
            answer.status = found.status_code
            for line in found.iter_lines():
                if line not in ("", "data: [DONE]"):
                    answer.num_events += 1
                    answer.last = json.loads(line.removeprefix("data: "))
        answer.ended = time.monotonic()

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    return answer, thread


def test_answers_on_a_revoked_key_end_and_those_on_other_keys_continue(place: AppServer, database: Database) -> None:
    """They once ran to their end, for as long as the request's time limit."""
    (key, secret), (other, other_secret) = create_key(database, "ann"), create_key(database, "bob")
    time.sleep(1.1)  # until the server knows them
    streamed, whole = (asking(place.url, secret, stream=stream) for stream in (True, False))
    others = asking(place.url, other_secret, stream=True)
    place.until_running(3)
    time.sleep(0.7)  # a look for revoked keys ends nobody's
    assert place.stats().num_running == 3
    began = time.monotonic()
    revoke_key(database, key.id)
    for answer, thread in (streamed, whole):
        thread.join(5)
        assert answer.ended - began < 2.5
        assert answer.last["error"]["code"] == "invalid_api_key" and "was revoked" in answer.last["error"]["message"]
    assert (streamed[0].status, whole[0].status) == (200, 401) and streamed[0].num_events > 2
    seen = others[0].num_events
    time.sleep(0.2)
    assert others[0].num_events > seen and place.stats().num_running == 1
    revoke_key(database, other.id)
    others[1].join(5)
    place.until_idle()


@pytest.mark.medium
def test_jobs_of_a_revoked_key_are_cancelled_and_the_next_one_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They once trained on, one after the other, and nobody could see or cancel them."""
    monkeypatch.setattr(queue, "_LOOK_AGAIN_S", 0.3)
    database = Database.in_folder(tmp_path)
    (key, secret), (_, other) = create_key(database, "ann"), create_key(database, "bob")
    with served(serving_app(build_base(), ServerConfig(state=str(tmp_path), require_keys=True))) as url:
        ann, bob = (openai.OpenAI(base_url=f"{url}/v1", api_key=each, max_retries=0) for each in (secret, other))
        file = upload(ann, plain_rows())
        jobs = [create_job(ann, file, {**LONG_JOB, "epochs": 1000}).id for _ in range(3)]
        paused = ann.fine_tuning.jobs.pause(jobs.pop()).id
        wait_until(lambda: ann.fine_tuning.jobs.retrieve(jobs[0]).status == "running")
        mine = create_job(bob, upload(bob, plain_rows())).id
        revoke_key(database, key.id)
        wait_until(lambda: bob.fine_tuning.jobs.retrieve(mine).status == "succeeded")
    with database.session() as session:
        assert {session.get_one(JobRow, each).status for each in (*jobs, paused)} == {"cancelled"}
    assert not list((tmp_path / "jobs").glob(f"{jobs[0]}/checkpoints"))
    database.close()

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
import pytest
from inference_runs import Place, place_of
from tiny_bases import build_base

from softprompt.config import EngineConfig, ServerConfig
from softprompt.server.clients.keys import create_key, revoke_key
from softprompt.server.start import serving_app
from softprompt.server.state.database import Database

LONG = 60_000  # tokens: some minutes


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    opened = Database.in_folder(tmp_path_factory.mktemp("state"))
    create_key(opened, "first")
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def place(database: Database) -> Iterator[Place]:
    base = build_base(max_position_embeddings=2 * LONG)
    config = ServerConfig(state=str(Path(str(database.url.database)).parent), require_keys=True)
    with place_of(serving_app(base, config, EngineConfig(kv_bytes=2**32))) as found:
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


def test_answers_on_a_revoked_key_end_and_those_on_others_go_on(place: Place, database: Database) -> None:
    """They once ran to their end, for as long as the request's time limit."""
    (key, secret), (other, other_secret) = create_key(database, "ann"), create_key(database, "bob")
    time.sleep(1.1)  # until the server knows them
    streamed, whole = (asking(place.url, secret, stream=stream) for stream in (True, False))
    others = asking(place.url, other_secret, stream=True)
    place.until_running(3)
    time.sleep(1.5)  # a look for revoked keys ends nobody's
    assert place.stats().num_running == 3
    began = time.monotonic()
    revoke_key(database, key.id)
    for answer, thread in (streamed, whole):
        thread.join(5)
        assert answer.ended - began < 2.5
        assert answer.last["error"]["code"] == "invalid_api_key" and "was revoked" in answer.last["error"]["message"]
    assert (streamed[0].status, whole[0].status) == (200, 401) and streamed[0].num_events > 2
    seen = others[0].num_events
    time.sleep(0.5)
    assert others[0].num_events > seen and place.stats().num_running == 1
    revoke_key(database, other.id)
    others[1].join(5)
    place.until_idle()

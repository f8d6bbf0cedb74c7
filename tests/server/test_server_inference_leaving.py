"""Clients that hang up free their rows at once; ends without an answer are told as errors."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import openai
import pytest
from support.app_server import AppServer, app_server, events_of
from support.tiny_bases import build_base, random_prompt

from softprompt.base import Base
from softprompt.config import EngineConfig
from softprompt.engine import Engine, Event
from softprompt.prompt import SoftPrompt

LONG = {"model": "quotes", "prompt": "w3", "max_tokens": 9000, "ignore_eos": True, "seed": 1}
AT_ONCE_S = 2.0  # a row is freed at the next step; the machine may be busy


@pytest.fixture(scope="module")
def long_base() -> Base:
    return build_base(max_position_embeddings=10_000)


@pytest.fixture(scope="module")
def place(long_base: Base, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AppServer]:
    prompts = {"quotes": SoftPrompt(random_prompt(long_base, 4))}
    config = EngineConfig(max_rows=2, max_waiting=3)
    with app_server(long_base, tmp_path_factory.mktemp("state"), prompts, config) as place:
        yield place


@contextmanager
def asking(place: AppServer, body: dict[str, object], path: str = "/v1/completions") -> Iterator[socket.socket]:
    """A request of which no answer is read yet."""
    content = json.dumps(body).encode()
    where = urlsplit(place.url)
    with socket.create_connection((where.hostname, where.port), timeout=10) as connection:
        lines = (f"POST {path} HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json",
                 f"Content-Length: {len(content)}", "", "")  # fmt: skip
        connection.sendall("\r\n".join(lines).encode() + content)
        yield connection


CHAT = {"model": "base", "messages": [{"role": "user", "content": "w3"}], "ignore_eos": True, "max_tokens": 9000}
WAYS = [
    pytest.param("/v1/completions", LONG, 1, id="whole"),
    pytest.param("/v1/completions", LONG | {"n": 2}, 2, id="choices"),
    pytest.param("/v1/completions", LONG | {"prompt": ["w3", "w4"]}, 2, id="texts"),
    pytest.param("/v1/completions", LONG | {"stream": True}, 1, id="stream"),
    pytest.param("/v1/completions", LONG | {"stream": True, "prompt": ["w3", "w4"]}, 2, id="stream-of-texts"),
    pytest.param("/v1/chat/completions", CHAT, 1, id="chat"),
    pytest.param("/v1/chat/completions", CHAT | {"stream": True}, 1, id="stream-of-chat"),
]


@pytest.mark.parametrize(("path", "body", "num_rows"), WAYS)
def test_who_hangs_up_frees_the_rows(place, path, body, num_rows):
    num_aborted = place.stats().num_aborted
    with asking(place, body, path) as connection:
        place.until_running(num_rows)
        if body.get("stream"):
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
    assert place.until_idle() < AT_ONCE_S
    assert place.stats().num_aborted > num_aborted


def test_who_hangs_up_while_waiting_frees_the_place_in_the_queue(place):
    with asking(place, LONG | {"n": 2}):
        place.until_running(2)
        with asking(place, LONG | {"stream": True}), asking(place, LONG):
            until(lambda: place.stats().num_waiting == 2)
        until(lambda: place.stats().num_waiting == 0)
        assert place.stats().num_running == 2
    assert place.until_idle() < AT_ONCE_S


def test_a_client_that_closes_its_stream_frees_the_row(place):
    with place.client.completions.create(
        model="quotes", prompt="w3", max_tokens=9000, stream=True, extra_body={"ignore_eos": True}
    ) as stream:
        assert next(iter(stream)).choices[0].text
    assert place.until_idle() < AT_ONCE_S


def test_a_cancelled_coroutine_frees_the_row(place):
    async def ask():
        async with place.async_client() as client:
            asked = client.completions.create(
                model="quotes", prompt="w3", max_tokens=9000, extra_body={"ignore_eos": True}
            )
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(asked, 0.3)

    asyncio.run(ask())
    assert place.until_idle() < AT_ONCE_S


@pytest.mark.parametrize("asked", [{}, {"stream": True}, {"stream": True, "prompt": ["w3", "w4"]}])
def test_a_full_queue_is_told_before_any_byte_of_the_answer(place, asked):
    with asking(place, LONG | {"n": 2}):
        place.until_running(2)
        with asking(place, LONG), asking(place, LONG), asking(place, LONG):
            until(lambda: place.stats().num_waiting == 3)
            refused = place.post("/v1/completions", LONG | asked)
    assert refused.status_code == 503 and int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["code"] == "queue_full"
    assert place.until_idle() < AT_ONCE_S


def until(holds):
    end = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_time_that_is_over_is_told(long_base, tmp_path):
    with app_server(long_base, tmp_path, request_timeout_s=0.3) as place:
        asked = LONG | {"model": "base"}
        late = place.post("/v1/completions", asked)
        assert late.status_code == 408 and late.json()["error"]["code"] == "timeout" and "0.3 s" in late.text
        streamed = place.post("/v1/completions", asked | {"stream": True})
        *events, error, done = events_of(streamed.text)
        assert streamed.status_code == 200 and done is None and len(events) > 5
        assert error["error"]["code"] == "timeout" and all("error" not in event for event in events)
        with pytest.raises(openai.APIError, match="longer than"):
            for _ in place.client.completions.create(
                model="base", prompt="w3", max_tokens=9000, stream=True, extra_body={"ignore_eos": True}
            ):
                pass


def test_an_engine_that_breaks_is_told(long_base, tmp_path, monkeypatch, caplog):
    breaks, step = threading.Event(), Engine.step

    def step_or_break(engine: Engine) -> list[Event]:
        if breaks.is_set():
            raise RuntimeError("the roof is on fire")
        return step(engine)

    monkeypatch.setattr(Engine, "step", step_or_break)
    with app_server(long_base, tmp_path) as place:
        asked = LONG | {"model": "base"}
        with place.http.stream("POST", "/v1/completions", json=asked | {"stream": True}) as streamed:
            lines = streamed.iter_lines()
            next(lines)
            breaks.set()
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]" and "roof is on fire" in rest[-2] and '"code":"generation_failed"' in rest[-2]
        behind = place.post("/v1/completions", asked)
        assert behind.status_code == 503 and behind.json()["error"]["code"] == "engine_stopped"
    assert "the engine's step failed" in caplog.text


def test_one_text_that_is_refused_refuses_the_call(place):
    """By the engine itself: what this base cannot spell."""
    asked = LONG | {"prompt": ["w3", "w4"], "max_tokens": 5, "stream": True, "guided_json": {"type": "object"}}
    refused = place.post("/v1/completions", asked)
    assert refused.status_code == 400 and "json_schema" in refused.json()["error"]["message"]
    place.until_idle()

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
def server(long_base: Base, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AppServer]:
    prompts = {"quotes": SoftPrompt(random_prompt(long_base, 4))}
    config = EngineConfig(max_rows=2, max_waiting=3)
    with app_server(long_base, tmp_path_factory.mktemp("state"), prompts, config) as server:
        yield server


@contextmanager
def asking(server: AppServer, body: dict[str, object], path: str = "/v1/completions") -> Iterator[socket.socket]:
    """A request of which no answer is read yet."""
    content = json.dumps(body).encode()
    where = urlsplit(server.url)
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
def test_a_disconnected_client_frees_its_rows(server, path, body, num_rows):
    num_aborted = server.stats().num_aborted
    with asking(server, body, path) as connection:
        server.until_running(num_rows)
        if body.get("stream"):
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
    assert server.until_idle() < AT_ONCE_S
    assert server.stats().num_aborted > num_aborted


def test_a_client_that_disconnects_while_queued_leaves_the_queue(server):
    with asking(server, LONG | {"n": 2}):
        server.until_running(2)
        with asking(server, LONG | {"stream": True}), asking(server, LONG):
            until(lambda: server.stats().num_waiting == 2)
        until(lambda: server.stats().num_waiting == 0)
        assert server.stats().num_running == 2
    assert server.until_idle() < AT_ONCE_S


def test_a_client_that_closes_its_stream_frees_the_row(server):
    with server.client.completions.create(
        model="quotes", prompt="w3", max_tokens=9000, stream=True, extra_body={"ignore_eos": True}
    ) as stream:
        assert next(iter(stream)).choices[0].text
    assert server.until_idle() < AT_ONCE_S


def test_a_cancelled_coroutine_frees_the_row(server):
    async def ask():
        async with server.async_client() as client:
            asked = client.completions.create(
                model="quotes", prompt="w3", max_tokens=9000, extra_body={"ignore_eos": True}
            )
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(asked, 0.3)

    asyncio.run(ask())
    assert server.until_idle() < AT_ONCE_S


@pytest.mark.parametrize("asked", [{}, {"stream": True}, {"stream": True, "prompt": ["w3", "w4"]}])
def test_a_full_queue_is_a_503_before_any_byte_of_the_answer(server, asked):
    with asking(server, LONG | {"n": 2}):
        server.until_running(2)
        with asking(server, LONG), asking(server, LONG), asking(server, LONG):
            until(lambda: server.stats().num_waiting == 3)
            refused = server.post("/v1/completions", LONG | asked)
    assert refused.status_code == 503 and int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["code"] == "queue_full"
    assert server.until_idle() < AT_ONCE_S


def until(holds):
    end = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_an_answer_that_exceeds_its_timeout_ends_with_an_error(long_base, tmp_path):
    with app_server(long_base, tmp_path, request_timeout_s=0.3) as server:
        asked = LONG | {"model": "base"}
        late = server.post("/v1/completions", asked)
        assert late.status_code == 408 and late.json()["error"]["code"] == "timeout" and "0.3 s" in late.text
        streamed = server.post("/v1/completions", asked | {"stream": True})
        *events, error, done = events_of(streamed.text)
        assert streamed.status_code == 200 and done is None and len(events) > 5
        assert error["error"]["code"] == "timeout" and all("error" not in event for event in events)
        with pytest.raises(openai.APIError, match="longer than"):
            for _ in server.client.completions.create(
                model="base", prompt="w3", max_tokens=9000, stream=True, extra_body={"ignore_eos": True}
            ):
                pass


def test_a_broken_engine_ends_streams_with_an_error_and_refuses_new_requests(long_base, tmp_path, monkeypatch, caplog):
    breaks, step = threading.Event(), Engine.step

    def step_or_break(engine: Engine) -> list[Event]:
        if breaks.is_set():
            raise RuntimeError("the roof is on fire")
        return step(engine)

    monkeypatch.setattr(Engine, "step", step_or_break)
    with app_server(long_base, tmp_path) as server:
        asked = LONG | {"model": "base"}
        with server.http.stream("POST", "/v1/completions", json=asked | {"stream": True}) as streamed:
            lines = streamed.iter_lines()
            next(lines)
            breaks.set()
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]" and "roof is on fire" in rest[-2] and '"code":"generation_failed"' in rest[-2]
        behind = server.post("/v1/completions", asked)
        assert behind.status_code == 503 and behind.json()["error"]["code"] == "engine_stopped"
    assert "the engine's step failed" in caplog.text


def test_a_refusal_of_one_text_refuses_the_whole_request(server):
    """By the engine itself: what this base cannot spell."""
    asked = LONG | {"prompt": ["w3", "w4"], "max_tokens": 5, "stream": True, "guided_json": {"type": "object"}}
    refused = server.post("/v1/completions", asked)
    assert refused.status_code == 400 and "json_schema" in refused.json()["error"]["message"]
    server.until_idle()

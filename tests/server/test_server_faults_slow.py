"""Clients that send slowly, that never read, that read too slowly, that vanish: each is cut off, the others are served
meanwhile, and memory stays."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import time
from collections.abc import AsyncGenerator, Iterator, MutableMapping
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from support.fault_server import Servers, Serving, save_base
from support.fault_work import Place
from support.prompt_server import eventually

from softprompt.engine import Request, Tokens
from softprompt.server.inference.format import CompletionFormat
from softprompt.server.inference.generation import Generation, GenerationEvent, OutputOptions
from softprompt.server.inference.logprobs import TokenTexts
from softprompt.server.inference.respond import EventStream
from softprompt.server.prompts.model import Model

pytestmark = pytest.mark.medium
PATIENCE_S, REQUEST_S = 1.0, 3.0
MOST_MIB = 60.0  # 16 unread answers with log-probabilities for REQUEST_S; five such clients in turn take no more
HEAD = b"POST %s HTTP/1.1\r\nhost: localhost\r\ncontent-type: %s\r\ncontent-length: %d\r\n\r\n"
FORM = b"multipart/form-data; boundary=x"
UPLOAD = b'--x\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\n' + b'{"text": "w3"}\n' * 9


@pytest.fixture(scope="module")
def server(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Serving, Path]]:
    place = tmp_path_factory.mktemp("slow")
    found = servers.start(save_base(place / "base", max_position_embeddings=8192), "--state", place / "state",
                          "--client-timeout-s", PATIENCE_S, "--request-timeout-s", REQUEST_S)  # fmt: skip
    yield found, place / "state"
    servers.kill(found)


@pytest.fixture
def place(server: tuple[Serving, Path]) -> Iterator[Place]:
    """Behind each test nothing is left of it: no row, no file, no memory to speak of, nothing broken in the log."""
    serving, state = server
    with closing(Place.at(serving.url)) as found:
        found.answer("base")
        before = serving.memory_mib
        yield found
        eventually(lambda: _running(found) == 0)
        assert found.answer("base")
        assert list((state / "files").iterdir()) == []
        assert serving.memory_mib - before < MOST_MIB
        assert "Traceback" not in serving.said and "ERROR" not in serving.said, serving.said


def _running(place: Place) -> float:
    """Rows of the engine, those that wait included."""
    lines = [line.split() for line in place.http.get("/metrics").text.splitlines()]
    names = ("softprompt:num_requests_running", "softprompt:num_requests_waiting")
    return sum(float(line[1]) for line in lines if line[0] in names)


def _connected(serving: Serving, **options: int) -> socket.socket:
    line = socket.socket()
    for name, value in options.items():
        line.setsockopt(socket.SOL_SOCKET, getattr(socket, name), value)
    line.connect(("127.0.0.1", int(serving.url.rpartition(":")[2])))
    return line


def _heard(line: socket.socket) -> bytes | None:
    """What has come; None where nothing has, b"" at the end."""
    try:
        return line.recv(10_000, socket.MSG_DONTWAIT)
    except BlockingIOError:
        return None
    except ConnectionError:
        return b""


def test_two_hundred_slow_bodies_are_refused_while_others_are_answered(
    server: tuple[Serving, Path], place: Place
) -> None:
    serving, _ = server
    asked = json.dumps({"model": "base", "prompt": "w3 " * 100}).encode()
    kinds = (
        (b"/v1/completions", b"application/json", asked),
        (b"/v1/files", FORM, UPLOAD),
        (b"/v1/prompts", FORM, UPLOAD),
    )
    with ExitStack() as stack:
        lines = {}
        for number in range(200):
            path, kind, body = kinds[number % len(kinds)]
            line = stack.enter_context(_connected(serving))
            line.sendall(HEAD % (path, kind, len(body) + 100))
            lines[line] = [body, time.monotonic(), b""]
        answers = []
        while lines:
            began = time.monotonic()
            place.answer("base")
            assert time.monotonic() - began < 1.0  # others do not wait for them
            for line, state in list(lines.items()):
                heard = _heard(line)
                if heard is None:
                    assert time.monotonic() - state[1] < PATIENCE_S + 4.0
                    line.send(state[0][:1])
                    state[0] = state[0][1:]
                elif heard:
                    state[2] += heard
                else:
                    answers.append(state[2])
                    del lines[line]
            time.sleep(0.1)
    assert len(answers) == 200
    assert all(answer.startswith(b"HTTP/1.1 408") and b"body_too_slow" in answer for answer in answers)


STREAM = {"model": "base", "prompt": "w3", "max_tokens": 8_000, "n": 16, "logprobs": 20, "stream": True,
          "ignore_eos": True}  # fmt: skip


@contextmanager
def _asking(serving: Serving) -> Iterator[socket.socket]:
    """A connection that has asked for a long stream of much text."""
    body = json.dumps(STREAM).encode()
    with _connected(serving, SO_RCVBUF=4096) as line:
        line.sendall(HEAD % (b"/v1/completions", b"application/json", len(body)) + body)
        yield line


def test_a_client_that_never_reads_costs_bounded_memory_until_the_timeout(
    server: tuple[Serving, Path], place: Place
) -> None:
    """Its answer waits in a bounded buffer, and ends when its time is over."""
    serving, _ = server
    before = most = serving.memory_mib
    with _asking(serving):
        eventually(lambda: _running(place) > 0)
        began = time.monotonic()
        while _running(place) > 0:
            most = max(most, serving.memory_mib)
            place.answer("base")
            assert time.monotonic() - began < REQUEST_S + 1
    assert most - before < MOST_MIB


def test_a_slow_readers_generation_ends_at_the_timeout(server: tuple[Serving, Path], place: Place) -> None:
    serving, _ = server
    with _asking(serving) as line:
        eventually(lambda: _running(place) > 0)
        began = time.monotonic()
        while _running(place) > 0:
            assert line.recv(4_000)
            time.sleep(0.05)
            assert time.monotonic() - began < REQUEST_S + 1


def test_a_stream_that_is_read_too_slowly_ends_with_an_error() -> None:
    """A client that reads just fast enough never to stall is cut off after twice the time that an answer may take."""

    async def ten_tokens() -> AsyncGenerator[tuple[int, GenerationEvent], None]:
        for number in range(10):
            yield 0, Tokens(0, 0, (number,), " w3", ())

    async def read(began: float) -> bytes:
        generation = cast(Generation, SimpleNamespace(
            began=began, requests=(Request((3,), timeout_s=5.0),), model=Model(id="base"), num_choices=1,
            fingerprint="fp", output=OutputOptions(is_stream=True),
        ))  # fmt: skip
        events, sent = ten_tokens(), bytearray()

        async def send(message: MutableMapping[str, Any]) -> None:
            sent.extend(message.get("body", b""))

        async def receive() -> MutableMapping[str, Any]:
            await asyncio.sleep(60)
            raise AssertionError("the stream has not ended")

        format = CompletionFormat(generation, cast(TokenTexts, None))
        await EventStream(generation, format, await anext(events), events)({}, receive, send)
        with pytest.raises(StopAsyncIteration):  # nothing waits any longer
            await anext(events)
        return bytes(sent)

    now = time.perf_counter()
    assert asyncio.run(read(now - 9)).count(b" w3") == 10
    late = asyncio.run(read(now - 11))
    assert late.count(b" w3") == 2 and b"read_too_slowly" in late and late.endswith(b"[DONE]\n\n")


def test_clients_that_vanish_midway_leave_no_row_file_or_task(server: tuple[Serving, Path], place: Place) -> None:
    """Half of a head, half of a body, half of an upload, a stream's beginning: and the connection is reset, or left."""
    serving, _ = server
    stream = json.dumps({**STREAM, "n": 1, "logprobs": None}).encode()
    heads = (
        b"",
        b"POST /v1/comp",
        HEAD % (b"/v1/completions", b"application/json", 1000) + b'{"model"',
        HEAD % (b"/v1/files", FORM, 100_000) + UPLOAD,
        HEAD % (b"/v1/prompts", FORM, 100_000) + UPLOAD,
        HEAD % (b"/v1/completions", b"application/json", len(stream)) + stream,
    )
    with ExitStack() as left:
        for number in range(120):
            line = _connected(serving)
            line.sendall(heads[number % len(heads)])
            if number % 4 == 3:
                left.enter_context(line)
                continue
            if number % 4 == 2:
                time.sleep(0.02)
            if number % 2:  # a reset in place of an end
                line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            line.close()
        assert place.answer("base")
        eventually(lambda: _running(place) == 0, within_s=20)

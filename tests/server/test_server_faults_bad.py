"""Thousands of requests that nobody should send: each is refused in words, nothing breaks, and memory stays."""

from __future__ import annotations

import json
import socket
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from support.fault_requests import Bad, bad_requests
from support.fault_server import Servers, Serving, save_base
from support.fault_work import ROWS, Place
from support.prompt_server import as_upload, made_prompt

from softprompt.base import load_base

MOST_MIB = 30.0
MOST_CHARACTERS = 2_000  # of a message, whatever it echoes
NOT_SERVED = (501, 503, 507)  # the only ones of the server's own that may be told
ENVELOPE = {"message", "type", "param", "code"}


@pytest.fixture(scope="module")
def server(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Serving, Path]]:
    """With a prompt, a file and an alias, which stay what they are."""
    place = tmp_path_factory.mktemp("bad")
    folder = save_base(place / "base")
    serving = servers.start(folder, "--state", place / "state", "--max-upload-bytes", 2**20,
                            "--max-body-bytes", 2**18, "--client-timeout-s", 10)  # fmt: skip
    with closing(Place.at(serving.url)) as at:
        known = made_prompt(load_base(str(folder), dtype="float32", device="cpu"))
        at.asked("POST", "/v1/prompts", data={"name": "known"}, files=as_upload(known))
        at.openai.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune")
        at.asked("PUT", "/v1/aliases/lasting", json={"model": "known"})
    yield serving, place / "state"
    servers.kill(serving)


def told(serving: Serving, request: Bad) -> bytes:
    """The whole answer."""
    with socket.create_connection(("127.0.0.1", int(serving.url.rpartition(":")[2])), timeout=30) as line:
        heard = b""
        try:
            line.sendall(request.data)
            if not request.is_answered:
                return b""
            if b"connection: close" not in request.data:
                line.shutdown(socket.SHUT_WR)
            while piece := line.recv(2**16):
                heard += piece
        except ConnectionError:  # what is too long is not read to its end
            pass
        return heard


def check(request: Bad, answer: bytes, state: Path) -> int:
    """Its status; 0 where the connection was closed without a word."""
    shown = (request.data[:400], answer[:1000])
    assert str(state).encode() not in answer and b"Traceback" not in answer, shown
    if not answer:
        return 0
    head, _, body = answer.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n").partition(b"\r\n\r\n")
    status = int(head.split()[1])
    assert status < 500 or status in NOT_SERVED, shown
    if status >= 400 and b"application/json" in head and not request.data.startswith(b"HEAD"):
        told = json.loads(body)["error"]
        assert set(told) == ENVELOPE and len(told["message"]) <= MOST_CHARACTERS, shown
        assert told["param"] is None or len(told["param"]) <= 100, shown
    return status


def good(place: Place) -> tuple[str, str, list[str], list[int]]:
    """What a sound client is told."""
    sizes = [file.bytes for file in place.openai.files.list() if file.filename == "rows.jsonl"]
    return place.answer("known"), place.answer("lasting"), place.prompts_that_serve(), sizes


def send(server: tuple[Serving, Path], seed: int, count: int) -> Counter[int]:
    serving, state = server
    outside = set(state.parent.iterdir())
    with closing(Place.at(serving.url)) as place:
        described = place.asked("GET", "/openapi.json")["paths"]
        routes = [(method.upper(), path) for path, methods in described.items() for method in methods]
        before = good(place)
        for request in bad_requests(routes, seed + 1000, 100):  # what is made once, is made
            told(serving, request)
        memory = serving.memory_mib
        statuses: Counter[int] = Counter()
        for request in bad_requests(routes, seed, count):
            statuses[check(request, told(serving, request), state)] += 1
            assert serving.is_alive, request.data[:400]
        assert good(place) == before
        grown = serving.memory_mib - memory
    print(f"{count} requests, {grown:.1f} MiB more, by status {dict(sorted(statuses.items()))}")
    assert grown < MOST_MIB
    assert "Traceback" not in serving.said, serving.said[serving.said.index("Traceback") - 500 :][:3000]
    assert set(state.parent.iterdir()) == outside
    assert not list((state / "files").glob(".*")) and not list((state / "prompts").glob(".*"))
    return statuses


@pytest.mark.medium
def test_two_hundred_bad_requests_get_no_5xx(server: tuple[Serving, Path]) -> None:
    statuses = send(server, seed=1, count=200)
    assert statuses[400] > 40 and statuses[404] > 20


@pytest.mark.slow
def test_ten_thousand_bad_requests_get_no_5xx(server: tuple[Serving, Path]) -> None:
    assert sum(send(server, seed=2, count=10_000).values()) == 10_000

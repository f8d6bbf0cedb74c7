"""What stands around every request: its id, its line in the log, limits for bodies and for clients that stall."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from support.running_server import Running, running

from softprompt.config import ServerConfig
from softprompt.server.telemetry.request_log import JsonLines, TextLines

MOST, MOST_UPLOADED = 1_000, 100_000


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    config = ServerConfig(max_body_bytes=MOST, max_upload_bytes=MOST_UPLOADED, client_timeout_s=0.5, drain_s=0.3)
    with running(config) as found:
        yield found


# -- ids


def test_a_request_gets_an_id(server):
    first, second = (server.ask("POST", "/v1/length", b"abc") for _ in range(2))
    assert first.body == b"3"
    assert first.headers["x-request-id"].startswith("req-")
    assert first.headers["x-request-id"] != second.headers["x-request-id"]


def test_the_clients_own_id_is_kept(server):
    given = "Trace-1.2_3" + "x" * 53
    assert server.ask("GET", "/nothing", headers={"X-Request-ID": given}).headers["x-request-id"] == given


@pytest.mark.parametrize("given", ["", "x" * 65, "a b", 'a"b', "ä", "a;b", "<script>"])
def test_an_id_that_is_not_sane_is_replaced(server, given):
    answer = server.ask("GET", "/nothing", headers={"X-Request-ID": given.encode("latin-1")})
    assert answer.headers["x-request-id"].startswith("req-")


def test_an_error_carries_the_request_id(server, caplog):
    with caplog.at_level(logging.ERROR, "softprompt"):
        answer = server.ask("GET", "/v1/broken", headers={"x-request-id": "mine"})
    assert (answer.status, answer.headers["x-request-id"]) == (500, "mine")
    assert answer.error == "the server has failed; its log says why"
    assert [str(record.exc_info[1]) for record in caplog.records if record.exc_info] == ["a bug"]


# -- bodies


def test_a_body_up_to_the_limit_is_read(server):
    assert server.ask("POST", "/v1/length", b"x" * MOST).body == str(MOST).encode()
    assert server.ask("POST", "/v1/length", iter([b"x" * MOST])).body == str(MOST).encode()


@pytest.mark.parametrize("size", [MOST + 1, 2 * MOST])
def test_a_body_announced_over_the_limit_is_refused(server, size):
    answer = server.ask("POST", "/v1/length", b"x" * size)
    assert answer.status == 413
    assert answer.error == "the request's body is larger than 1000 bytes, the most that is taken; send less at once"
    assert answer.headers["connection"] == "close"


def test_a_chunked_body_over_the_limit_is_refused(server):
    answer = server.ask("POST", "/v1/length", iter([b"x" * 600, b"x" * 600]))
    assert (answer.status, json.loads(answer.body)["error"]["code"]) == (413, "body_too_large")


def test_a_chunked_json_body_over_the_limit_is_refused(server):
    """FastAPI reads this one itself and would call it a parsing error."""
    answer = server.ask(
        "POST", "/v1/echo/m", iter([b'{"a": "', b"x" * MOST, b'"}']), {"content-type": "application/json"}
    )
    assert answer.status == 413


def test_uploads_have_a_limit_of_their_own(server):
    assert server.ask("POST", "/v1/files", b"x" * 5 * MOST).body == str(5 * MOST).encode()
    assert server.ask("POST", "/v1/files", b"x" * (MOST_UPLOADED + 2**17)).status == 413
    assert server.ask("POST", "/v1/filesystem", b"x" * 5 * MOST).status == 413


def test_a_slow_body_is_refused(server):
    with server.connect() as line:
        line.sendall(b"POST /v1/length HTTP/1.1\r\nhost: localhost\r\ncontent-length: 900\r\n\r\n")
        began = time.monotonic()
        line.settimeout(0.05)
        answer = b""
        while not answer and time.monotonic() - began < 5:
            line.sendall(b"x")  # never silent for long
            try:
                answer = line.recv(10_000)
            except TimeoutError:
                continue
        assert 0.4 < time.monotonic() - began < 4
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"bytes of the request's body came in" in answer


# -- connections


def test_an_answer_that_nobody_reads_is_not_generated_ahead():
    """No more than a write buffer of it is in memory, and the client's leaving ends it."""
    with running(ServerConfig()) as server, server.connect() as line:
        line.sendall(b"GET /v1/stream?seconds=200&num_bytes=50000 HTTP/1.1\r\nhost: localhost\r\n\r\n")
        _until(lambda: server.lifecycle.num_running == 1)
        (connection,) = server.server.server_state.connections
        _until(lambda: connection.transport.get_write_buffer_size() > 0)
        sizes = []
        for _ in range(60):
            sizes.append(connection.transport.get_write_buffer_size())
            time.sleep(0.005)
        assert 0 < max(sizes) < 2**18
        line.close()
        _until(lambda: server.lifecycle.num_running == 0)
        assert server.value("http_requests_total", method="GET", route="/v1/stream", status="200")


@pytest.mark.medium
def test_a_thousand_idle_clients_keep_nobody_waiting():
    with running(ServerConfig()) as server, ExitStack() as lines:
        held = [lines.enter_context(server.connect()) for _ in range(1_000)]
        for line in held[:500]:  # half of them have asked something before
            line.sendall(b"GET /nothing HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert all(line.recv(1_000).startswith(b"HTTP/1.1 404") for line in held[:500])
        _until(lambda: len(server.server.server_state.connections) == 1_000)
        began = time.monotonic()
        assert server.ask("POST", "/v1/length", b"x").body == b"1"
        assert time.monotonic() - began < 10
        held[0].sendall(b"GET /nothing HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert held[0].recv(1_000).startswith(b"HTTP/1.1 404")


# -- the log and the metrics


def test_a_request_is_one_log_line_without_texts(server, caplog):
    with caplog.at_level(logging.INFO, "softprompt"):
        server.ask("POST", "/v1/echo/coach", b'{"secret": 1}', {"content-type": "application/json"})
        _until(lambda: caplog.records)
    (fields,) = [record.fields for record in caplog.records]
    assert 0 < fields.pop("duration_ms") < 5_000
    assert fields == {"method": "POST", "route": "/v1/echo/{name}", "status": 200, "client": None, "model": "coach",
                      "prompt_tokens": 3, "completion_tokens": 5}  # fmt: skip


def test_log_texts_adds_both_bodies_to_the_log_line(caplog):
    with running(ServerConfig(log_texts=True)) as server, caplog.at_level(logging.INFO, "softprompt"):
        server.ask("POST", "/v1/echo/coach", b'{"secret": 1}', {"content-type": "application/json"})
        _until(lambda: caplog.records)
    (fields,) = [record.fields for record in caplog.records if record.message == "request"]
    assert (fields["request_body"], fields["response_body"]) == ('{"secret": 1}', '{"secret":1}')


def test_a_log_line_is_json_or_text_and_cannot_be_forged():
    record = logging.LogRecord("softprompt.x", logging.INFO, "", 0, "name %s", ("a\nb",), None)
    record.fields = {"model": 'x y"\n', "status": 200, "client": None}
    line = json.loads(JsonLines().format(record))
    assert (line["message"], line["model"], line["status"], line["level"]) == ("name a\nb", 'x y"\n', 200, "info")
    assert "client" not in line
    assert "\n" not in JsonLines().format(record)
    text = TextLines().format(record)
    assert "\n" not in text
    assert text.endswith('INFO    name a\\nb model="x y\\"\\n" status=200')


def test_routes_are_counted_by_their_template(server):
    for name in ("a", "b"):
        server.ask("POST", f"/v1/echo/{name}", b"{}", {"content-type": "application/json"})
    for path in ("/made-up", "/made-up-2"):
        server.ask("GET", path)
    server.ask("PURGE", "/made-up")
    _until(lambda: server.value("http_requests_total", method="other", route="other", status="404") == 1)
    assert server.value("http_requests_total", method="GET", route="other", status="404") >= 2
    routes = {sample.labels["route"] for metric in server.metrics.registry.collect()
              for sample in metric.samples if "route" in sample.labels}  # fmt: skip
    assert "/v1/echo/{name}" in routes
    assert not any("made-up" in route or route.endswith("/a") for route in routes)


# -- the end


def test_a_draining_server_refuses_new_requests_and_finishes_running_ones():
    with running(ServerConfig(drain_s=20)) as server, server.connect() as line:
        line.sendall(b"GET /v1/stream?seconds=0.5 HTTP/1.1\r\nhost: localhost\r\n\r\n")
        heard = line.recv(1_000)
        server.server.handle_exit(15, None)
        _until(lambda: server.lifecycle.is_draining)
        refused = server.ask("POST", "/v1/length", b"x")
        assert (refused.status, refused.error) == (503, "the server is being stopped; try again soon")
        assert refused.headers["retry-after"] == "5"
        began = time.monotonic()
        while piece := line.recv(10_000):
            heard += piece
        assert heard.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        assert time.monotonic() - began < 15  # as soon as it could, long before the drain is over


def test_a_stream_beyond_the_drain_time_ends_with_an_error():
    with running(ServerConfig(drain_s=0.3)) as server, server.connect() as line:
        line.sendall(b"GET /v1/stream?seconds=60 HTTP/1.1\r\nhost: localhost\r\n\r\n")
        heard = line.recv(1_000)
        server.server.handle_exit(15, None)
        began = time.monotonic()
        while piece := line.recv(10_000):
            heard += piece
        assert time.monotonic() - began < 15
        assert heard.endswith(b"}}\n\n\r\n0\r\n\r\n")  # the stream's last event
        told = json.loads(heard.rpartition(b"data: ")[2].partition(b"\n")[0])
        assert told["error"]["code"] == "stopping"


def _until(holds, seconds: float = 30.0):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.01)

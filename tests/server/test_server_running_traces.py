"""OpenTelemetry: spans arrive at a collector, with the client's own as their parent and no texts."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from support.running_server import running, small_app

from softprompt.config import ServerConfig
from softprompt.errors import MissingDependencyError
from softprompt.server.dependencies import dependency_of
from softprompt.server.telemetry.tracing import Tracing

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@contextmanager
def collector() -> Iterator[tuple[str, list[bytes]]]:
    """Takes what an OTLP exporter posts; gives its endpoint and the bodies."""
    bodies: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            bodies.append(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1/traces", bodies
        finally:
            server.shutdown()
            thread.join()


def test_a_span_per_request_reaches_the_collector():
    with collector() as (endpoint, bodies):
        config = ServerConfig(traces=endpoint)
        app = small_app(config)
        with running(config, app) as server:
            headers = {"content-type": "application/json", "traceparent": f"00-{TRACE}-{PARENT}-01"}
            server.ask("POST", "/v1/echo/coach", b'{"secret": "text"}', headers)
            server.ask("GET", "/v1/broken", headers={"x-request-id": "mine"})
            server.ask("GET", "/health")
        asyncio.run(dependency_of(app, Tracing).close())
        spans = {span.name: span for span in _spans(bodies)}
        assert not any(b"secret" in body for body in bodies)
    assert sorted(spans) == ["GET /v1/broken", "POST /v1/echo/{name}"]
    echo, broken = spans["POST /v1/echo/{name}"], spans["GET /v1/broken"]
    assert (echo.trace_id.hex(), echo.parent_span_id.hex()) == (TRACE, PARENT)
    assert broken.parent_span_id == b""
    assert broken.trace_id.hex() != TRACE
    found = {item.key: item.value.string_value or item.value.int_value for item in echo.attributes}
    found.pop("softprompt.request_id")
    assert found == {
        "http.request.method": "POST", "http.route": "/v1/echo/{name}", "http.response.status_code": 200,
        "gen_ai.request.model": "coach", "gen_ai.usage.input_tokens": 3, "gen_ai.usage.output_tokens": 5,
    }  # fmt: skip
    assert (echo.status.code, broken.status.code) == (0, 2)
    assert echo.end_time_unix_nano > echo.start_time_unix_nano


def test_malformed_traceparents_are_ignored():
    parents = ("", "nonsense", "00-" + "0" * 32 + "-" + "0" * 16 + "-01", "é" * 300)
    with collector() as (endpoint, bodies):
        config = ServerConfig(traces=endpoint)
        app = small_app(config)
        with running(config, app) as server:
            for number, parent in enumerate(parents):
                sent = {"traceparent": parent.encode("latin-1"), "content-type": "application/json"}
                assert server.ask("POST", f"/v1/echo/{number}", b"{}", sent).status == 200
        asyncio.run(dependency_of(app, Tracing).close())
        spans = _spans(bodies)
    assert [span.parent_span_id for span in spans] == [b""] * len(parents)


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'softprompt\[tracing\]'"):
        Tracing("http://127.0.0.1:1/v1/traces")
    Tracing(None)


def _spans(bodies):
    return [
        span
        for body in bodies
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]

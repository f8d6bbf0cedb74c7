"""OpenTelemetry traces, where they are asked for: one span per request, exported as OTLP over HTTP. No texts."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from starlette.datastructures import Headers
from starlette.types import Scope

from softprompt.errors import MissingDependencyError
from softprompt.server.clients.auth import client_of
from softprompt.server.telemetry.request_log import RequestLog, route_of


class Tracing:
    """Spans of this app; nothing is set for the whole process. Without an endpoint it does nothing."""

    def __init__(self, endpoint: str | None) -> None:
        """`endpoint`: "http://host:4318/v1/traces" say. Raises MissingDependencyError."""
        self._provider: Any = None if endpoint is None else _provider(endpoint)  # Any: an optional package's
        self._tracer: Any = None if self._provider is None else self._provider.get_tracer("softprompt")

    @contextmanager
    def span(self, scope: Scope, log: RequestLog) -> Iterator[None]:
        """Around one request; a child of the client's own span where it names one (W3C traceparent)."""
        if self._tracer is None:
            yield
            return
        from opentelemetry.trace import SpanKind

        with self._tracer.start_as_current_span(log.method, _parent(scope), SpanKind.SERVER) as span:
            try:
                yield
            finally:
                span.update_name(f"{log.method} {route_of(scope)}")
                span.set_attributes(_attributes(scope, log))
                if log.status >= 500:
                    span.set_status(_failed())

    async def close(self) -> None:
        """Export what is left."""
        if self._provider is not None:
            await asyncio.to_thread(self._provider.shutdown)


def _provider(endpoint: str) -> Any:  # Any: an optional package's
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise MissingDependencyError(
            "traces need OpenTelemetry's packages; pip install 'softprompt[tracing]'"
        ) from error
    provider = TracerProvider(resource=Resource.create({"service.name": "softprompt"}), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    return provider


def _parent(scope: Scope) -> Any:  # Any: an optional package's
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator().extract(Headers(scope=scope))


def _attributes(scope: Scope, log: RequestLog) -> dict[str, str | int]:
    """OpenTelemetry's names where it has them."""
    found: dict[str, str | int | None] = {
        "http.request.method": log.method,
        "http.route": route_of(scope),
        "http.response.status_code": log.status,
        "gen_ai.request.model": log.model,
        "gen_ai.usage.input_tokens": log.num_prompt_tokens,
        "gen_ai.usage.output_tokens": log.num_new_tokens,
        "softprompt.client": client_of(scope),
        "softprompt.request_id": log.id,
    }
    return {name: value for name, value in found.items() if value is not None}


def _failed() -> Any:  # Any: an optional package's
    from opentelemetry.trace import Status, StatusCode

    return Status(StatusCode.ERROR)

"""Figures of generations by model. A stream counts every token, so each labelled child is looked up once a request."""

from __future__ import annotations

import time
from typing import Any, Literal

from prometheus_client import CollectorRegistry, Counter, Histogram

PREFIX = "softprompt:"
MODEL = "model_name"
End = Literal["stop", "length", "abort", "error"]

_ENDS: tuple[End, ...] = ("stop", "length", "abort", "error")
_FIRST_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_BETWEEN_S = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 20_000)


class PerModel:
    """The metrics that carry `model_name`."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(PREFIX + name, text, (MODEL, *labels), registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(PREFIX + name, text, (MODEL,), buckets=buckets, registry=registry)

        self.read = counter("prompt_tokens", "Tokens of texts that were read, virtual ones apart.")
        self.virtual = counter("virtual_tokens", "Virtual tokens of soft prompts that stood before them.")
        self.written = counter("generation_tokens", "Tokens that were generated.")
        self.ends = counter("request_success", "Generations that have ended, by how.", "finished_reason")
        self.first = histogram("time_to_first_token_seconds", "From a request to its first token.", _FIRST_S)
        self.between = histogram("inter_token_latency_seconds", "From one token of an answer to the next.", _BETWEEN_S)
        self.mean = histogram("request_time_per_output_token_seconds", "The mean of that over one answer.", _BETWEEN_S)
        self.whole = histogram("e2e_request_latency_seconds", "From a request to its answer's end.", _FIRST_S)
        self.texts = histogram("request_prompt_tokens", "Tokens of one request's text.", _TOKENS)
        self.answers = histogram("request_generation_tokens", "Tokens generated for one request.", _TOKENS)

    def forget(self, model: str) -> None:
        """Drop the series of one model. Generations that still count into them do so for nobody."""
        for end in _ENDS:
            self.ends.remove(model, end)
        for each in (self.read, self.virtual, self.written, self.first, self.between, self.mean, self.whole,
                     self.texts, self.answers):  # fmt: skip
            each.remove(model)


class Generation:
    """One request for generation, with one answer or several. Made by `Metrics.generation_started`."""

    def __init__(self, metrics: PerModel, label: str) -> None:
        self._metrics, self._label = metrics, label
        self._written: Any = metrics.written.labels(label)  # Any: prometheus_client's child has its parent's type
        self._between: Any = metrics.between.labels(label)
        self._began = time.perf_counter()
        self._first_at: float | None = None
        self._last_at = self._began
        self._num_tokens = 0
        self._has_ended = False

    def tokens(self, num_tokens: int) -> None:
        """New tokens of one event have come."""
        now = time.perf_counter()
        self._num_tokens += num_tokens
        self._written.inc(num_tokens)
        if self._first_at is None:
            self._first_at = now
            self._metrics.first.labels(self._label).observe(now - self._began)
        else:
            self._between.observe(now - self._last_at)
        self._last_at = now

    def ended(self, how: End, num_prompt_tokens: int = 0, num_virtual_tokens: int = 0) -> None:
        """Its end, told once; telling it again counts nothing, so that a `finally` may say "abort"."""
        if self._has_ended:
            return
        self._has_ended = True
        metrics, label = self._metrics, self._label
        metrics.ends.labels(label, how).inc()
        metrics.read.labels(label).inc(num_prompt_tokens)
        metrics.virtual.labels(label).inc(num_virtual_tokens)
        metrics.texts.labels(label).observe(num_prompt_tokens)
        metrics.answers.labels(label).observe(self._num_tokens)
        metrics.whole.labels(label).observe(time.perf_counter() - self._began)
        if self._first_at is not None and self._num_tokens > 1:
            metrics.mean.labels(label).observe((self._last_at - self._first_at) / (self._num_tokens - 1))

"""What the server counts, under vLLM's names with our prefix: `softprompt:prompt_tokens_total` and so on.

Every app has its own registry. `model_name` is one of the hundred most used names, or "other".
"""

from __future__ import annotations

import asyncio
import collections
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlalchemy import func, select

from softprompt.engine import AsyncEngine, EngineStats
from softprompt.errors import DatabaseError, EngineError
from softprompt.server.state.database import Database
from softprompt.server.state.schema import JobRow

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Metrics:
    """One per app. Any thread may count."""

    def __init__(self, max_names: int = 100) -> None:
        """`max_names`: models with a label of their own, and likewise pairs of an alias and a model of it."""
        registry = self.registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._per_model = ModelMetrics(registry)
        self._models: BoundedNames[str] = BoundedNames(max_names, self._per_model.forget)
        self._pairs: BoundedNames[tuple[str, str]] = BoundedNames(max_names, lambda pair: self._drawn.remove(*pair))
        self._drawn = Counter(f"{PREFIX}alias_draws", "Requests that an alias has sent to each of its models.",
                              ("alias", MODEL), registry=registry)  # fmt: skip
        self._trained = Counter(f"{PREFIX}training_tokens", "Tokens that fine-tuning jobs have read.",
                                registry=registry)  # fmt: skip
        self._requests = Counter(f"{PREFIX}http_requests", "Requests by route and status; 499: the client hung up.",
                                 ("method", "route", "status"), registry=registry)  # fmt: skip
        self._seconds = Histogram(f"{PREFIX}http_request_duration_seconds", "From a request to its answer's end.",
                                  ("route",), buckets=_SECONDS, registry=registry)  # fmt: skip

    def generation_started(self, model: str) -> GenerationMetrics:
        """What one request for generation is counted with. Whoever asks for it calls its `ended`."""
        return GenerationMetrics(self._per_model, model if self._models.use(model) else OTHER)

    def drawn(self, alias: str, model: str) -> None:
        """A request for `alias` goes to `model`, one of the several that it stands for."""
        self._drawn.labels(*((alias, model) if self._pairs.use((alias, model)) else (OTHER, OTHER))).inc()

    def trained(self, num_tokens: int) -> None:
        """A fine-tuning job has read so many tokens more."""
        self._trained.inc(num_tokens)

    def answered(self, route: str, method: str, status: int, seconds: float) -> None:
        """An HTTP request has ended. `route` is the path's template, never the path."""
        self._requests.labels(method, route, status).inc()
        self._seconds.labels(route).observe(seconds)


Name = TypeVar("Name", bound=Hashable)

OTHER = "other"  # the label of all the rest
_REMEMBERED = 20  # times as many names are counted as may be shown
_CLEARLY = 2  # times as often as the least used one must a name be used to take its place


class BoundedNames(Generic[Name]):
    """At most `most` names are shown at any time.

    A name that has clearly overtaken the least used one replaces it; `forget` is called with the one
    that was replaced. So no series ever counts backwards: one begins at 0, grows, and may end.
    """

    def __init__(self, most: int, forget: Callable[[Name], None]) -> None:
        self._most = most
        self._forget = forget
        self._uses: collections.Counter[Name] = collections.Counter()
        self._shown: set[Name] = set()
        self._lock = threading.Lock()

    def use(self, name: Name) -> bool:
        """Count one use; whether the name is shown."""
        with self._lock:
            self._uses[name] += 1
            self._limit_memory()
            return name in self._shown or self._finds_place(name)

    def _finds_place(self, name: Name) -> bool:
        if len(self._shown) >= self._most:
            least = min(self._shown, key=self._uses.__getitem__)
            if self._uses[name] <= _CLEARLY * self._uses[least]:
                return False
            self._shown.discard(least)
            self._forget(least)
        self._shown.add(name)
        return True

    def _limit_memory(self) -> None:
        if len(self._uses) > _REMEMBERED * self._most:
            kept = [*self._shown, *(name for name, _ in self._uses.most_common(_REMEMBERED * self._most // 2))]
            self._uses = collections.Counter({name: self._uses[name] for name in kept})


PREFIX = "softprompt:"
MODEL = "model_name"
End = Literal["stop", "length", "abort", "error"]

_ENDS: tuple[End, ...] = ("stop", "length", "abort", "error")
_FIRST_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_BETWEEN_S = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 20_000)


class ModelMetrics:
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


class GenerationMetrics:
    """One request for generation, with one answer or several. Made by `Metrics.generation_started`."""

    def __init__(self, metrics: ModelMetrics, label: str) -> None:
        self._metrics, self._label = metrics, label
        self._written: Any = metrics.written.labels(label)  # Any: prometheus_client's child has its parent's type
        self._between: Any = metrics.between.labels(label)
        self._began = time.perf_counter()
        self._first_at: float | None = None
        self._last_at = self._began
        self.num_tokens = 0  # generated so far
        self._has_ended = False

    def tokens(self, num_tokens: int) -> None:
        """New tokens of one event have come."""
        now = time.perf_counter()
        self.num_tokens += num_tokens
        self._written.inc(num_tokens)
        if self._first_at is None:
            self._first_at = now
            self._metrics.first.labels(self._label).observe(now - self._began)
        else:
            self._between.observe(now - self._last_at)
        self._last_at = now

    def ended(self, how: End, num_prompt_tokens: int = 0, num_virtual_tokens: int = 0) -> None:
        """Count its end. Only the first call counts, so that a `finally` may pass "abort"."""
        if self._has_ended:
            return
        self._has_ended = True
        metrics, label = self._metrics, self._label
        metrics.ends.labels(label, how).inc()
        metrics.read.labels(label).inc(num_prompt_tokens)
        metrics.virtual.labels(label).inc(num_virtual_tokens)
        metrics.texts.labels(label).observe(num_prompt_tokens)
        metrics.answers.labels(label).observe(self.num_tokens)
        metrics.whole.labels(label).observe(time.perf_counter() - self._began)
        if self._first_at is not None and self.num_tokens > 1:
            metrics.mean.labels(label).observe((self._last_at - self._first_at) / (self.num_tokens - 1))


_PATIENCE_S = 2.0  # for the engine, which answers between two steps

CountPrompts = Callable[[], Mapping[str, int]]


@dataclass(frozen=True)
class Collectors:
    """Where to look."""

    engine: AsyncEngine
    database: Database
    prompts: CountPrompts  # how many are served, by source

    async def look(self) -> CollectorRegistry:
        """All of them as they stand now. A part that does not answer, the engine say, has none: the others still do."""
        try:
            stats = await asyncio.wait_for(self.engine.stats(), _PATIENCE_S)
        except (EngineError, asyncio.TimeoutError):
            stats = None
        jobs = await asyncio.to_thread(self._jobs)
        registry = CollectorRegistry()
        registry.register(_Found([*engine_metrics(stats), _by("prompts", "Soft prompts that are served.", "source",
                                 self.prompts()), _by("jobs", "Fine-tuning jobs.", "status", jobs)]))  # fmt: skip
        return registry

    def _jobs(self) -> Mapping[str, int]:
        try:
            with self.database.session() as session:
                rows = session.execute(select(JobRow.status, func.count()).group_by(JobRow.status))
                return {status: count for status, count in rows}  # noqa: C416
        except DatabaseError:
            return {}


def engine_metrics(stats: EngineStats | None) -> Iterator[Metric]:
    """What an engine knows of itself, under vLLM's names."""
    if stats is None:
        return
    usage = stats.kv_bytes_in_use / max(1, stats.kv_bytes_limit)
    yield _gauge("num_requests_running", "Answers that are being generated.", stats.num_running)
    yield _gauge("num_requests_waiting", "Answers that wait for room.", stats.num_waiting)
    yield _gauge("kv_cache_usage_perc", "Share of the memory for keys and values in use; 1 is all of it.", usage)
    yield _gauge("prefix_cache_bytes", "Keys and values of soft prompts that are held.", stats.prefix_bytes)
    yield _gauge("prefix_cache_entries", "Soft prompts whose keys and values are held.", stats.num_prefixes)
    yield _counter("prefix_cache_queries", "Times that a soft prompt's keys and values were looked for.",
                   stats.num_prefix_hits + stats.num_prefix_misses)  # fmt: skip
    yield _counter("prefix_cache_hits", "Times that they were there.", stats.num_prefix_hits)
    yield _counter("num_preemptions", "Answers that had to give their memory back for a while.", stats.num_preemptions)
    yield _counter("engine_steps", "Steps of the engine.", stats.num_steps)


class _Found(Collector):
    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> list[Metric]:
        return self._families


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(PREFIX + name, text, value=value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(PREFIX + name, text, value=value)


def _by(name: str, text: str, label: str, counts: Mapping[str, int]) -> Metric:
    family = GaugeMetricFamily(PREFIX + name, text, labels=(label,))
    for value, count in sorted(counts.items()):
        family.add_metric((value,), count)
    return family

"""Figures that stand somewhere else and are looked up when somebody asks: the engine's, the prompts', the jobs'."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlalchemy import func, select

from softprompt.engine import AsyncEngine, EngineStats
from softprompt.errors import DatabaseError, EngineError
from softprompt.server.running.generations import PREFIX
from softprompt.server.state.database import Database
from softprompt.server.state.schema import JobRow

_PATIENCE_S = 2.0  # for the engine, which answers between two steps

CountPrompts = Callable[[], Mapping[str, int]]


@dataclass(frozen=True)
class Figures:
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
        registry.register(_Found([*engine_figures(stats), _by("prompts", "Soft prompts that are served.", "source",
                                 self.prompts()), _by("jobs", "Fine-tuning jobs.", "status", jobs)]))  # fmt: skip
        return registry

    def _jobs(self) -> Mapping[str, int]:
        try:
            with self.database.session() as session:
                rows = session.execute(select(JobRow.status, func.count()).group_by(JobRow.status))
                return {status: count for status, count in rows}  # noqa: C416
        except DatabaseError:
            return {}


def engine_figures(stats: EngineStats | None) -> Iterator[Metric]:
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

"""What the server counts, under vLLM's names with our prefix: `softprompt:prompt_tokens_total` and so on.

Every app has its own registry. `model_name` is one of the hundred most used names, or "other".
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector

from softprompt.server.running.bounded_names import OTHER, BoundedNames
from softprompt.server.running.generations import MODEL, PREFIX, Generation, PerModel

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Metrics:
    """One per app. Any thread may count."""

    def __init__(self, max_names: int = 100) -> None:
        """`max_names`: models with a label of their own, and likewise pairs of an alias and a model of it."""
        registry = self.registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._per_model = PerModel(registry)
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

    def generation_started(self, model: str) -> Generation:
        """What one request for generation is counted with. Whoever asks for it calls its `ended`."""
        return Generation(self._per_model, model if self._models.use(model) else OTHER)

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

"""How much each client may ask for: requests and tokens per minute, answers and jobs at once.

What is left of it stands in the head of every answer, streams and errors included.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fastapi import Request
from starlette.types import Scope

from softprompt.config import ServerConfig
from softprompt.server.clients.keys import Client, Limits
from softprompt.server.errors import ApiError

_MAX_IDLE = 1_000  # clients that are remembered though they have all of their limits at hand
_BUSY_S = 1.0  # when to try again where nobody knows when an answer ends


class RateLimiter:
    """The limits of all clients: a key's own where it has some, else the server's. Any thread may use it."""

    def __init__(self, defaults: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self._defaults = defaults
        self._clock = clock
        self._lock = threading.Lock()
        self._uses: dict[str, _Use] = {}  # by client

    @classmethod
    def of(cls, config: ServerConfig) -> RateLimiter:
        """By the server's settings."""
        return cls(Limits(requests_per_minute=config.requests_per_minute, tokens_per_minute=config.tokens_per_minute,
                          max_concurrent=config.max_concurrent, max_jobs=config.max_jobs))  # fmt: skip

    def request(self, client: Client) -> None:
        """Count one request of any kind. Raises ApiError 429, which is not counted."""
        limits, now = self.limits(client), self._clock()
        with self._lock:
            requests = self._use(client, limits, now).requests
            if requests is not None:
                _require(requests, now, "requests")
                requests.take(1, now)

    def headers(self, client: Client) -> dict[str, str]:
        """OpenAI's x-ratelimit headers: what is left of the limits that the client has."""
        limits, now = self.limits(client), self._clock()
        with self._lock:
            return self._use(client, limits, now).headers(now)

    def admit(self, client: Client, *, num_answers: int = 1, num_tokens: int = 0) -> None:
        """Let so many answers wait or run, which read `num_tokens`. Raises ApiError 429, or 400 where they never can.

        Each call that was admitted ends with `ended`.
        """
        limits, now = self.limits(client), self._clock()
        with self._lock:
            use = self._use(client, limits, now)
            if limits.max_concurrent is not None:
                _require_room(use.num_running, num_answers, limits.max_concurrent)
            if use.tokens is not None:
                _require(use.tokens, now, "tokens")
                use.tokens.take(num_tokens, now)
            use.num_running += num_answers

    def ended(self, client: Client, *, num_answers: int = 1, num_tokens: int = 0) -> None:
        """They wait or run no more, and have written `num_tokens`.

        There may be more of them than were left: then the next call waits for that.
        """
        limits, now = self.limits(client), self._clock()
        with self._lock:
            use = self._use(client, limits, now)
            use.num_running -= num_answers
            if use.tokens is not None:
                use.tokens.take(num_tokens, now)

    def limits(self, client: Client) -> Limits:
        """What holds for a client, `max_jobs` too."""
        return client.limits.or_else(self._defaults)

    def _use(self, client: Client, limits: Limits, now: float) -> _Use:
        use = self._uses.get(client.id)
        if use is None:
            self._forget_idle(now)
            use = self._uses[client.id] = _Use()
        use.requests = _kept(use.requests, limits.requests_per_minute, now)
        use.tokens = _kept(use.tokens, limits.tokens_per_minute, now)
        return use

    def _forget_idle(self, now: float) -> None:
        if len(self._uses) >= _MAX_IDLE:
            self._uses = {name: use for name, use in self._uses.items() if not use.is_idle(now)}


@dataclass
class _Use:
    """What one client has used of its limits."""

    requests: Bucket | None = None  # None: no limit
    tokens: Bucket | None = None
    num_running: int = 0  # answers that wait or run

    def is_idle(self, now: float) -> bool:
        buckets = [bucket for bucket in (self.requests, self.tokens) if bucket is not None]
        return self.num_running == 0 and all(bucket.level(now) >= bucket.per_minute for bucket in buckets)

    def headers(self, now: float) -> dict[str, str]:
        found = {}
        for name, bucket in (("requests", self.requests), ("tokens", self.tokens)):
            if bucket is not None:
                found[f"x-ratelimit-limit-{name}"] = str(int(bucket.per_minute))
                found[f"x-ratelimit-remaining-{name}"] = str(max(0, math.floor(bucket.level(now))))
                found[f"x-ratelimit-reset-{name}"] = f"{bucket.wait_s(bucket.per_minute, now):.3f}s"
        return found


def _kept(bucket: Bucket | None, per_minute: int | None, now: float) -> Bucket | None:
    """The bucket, or a new one where the limit is another."""
    if per_minute is None:
        return None
    return bucket if bucket is not None and bucket.per_minute == per_minute else Bucket(per_minute, now)


def _require(bucket: Bucket, now: float, what: str) -> None:
    wait_s = bucket.wait_s(1, now)
    if wait_s > 0:
        raise ApiError(429, f"this key may use {bucket.per_minute:g} {what} per minute, and has used them; "
                            f"try again in {wait_s:.3f} s", "rate_limit_exceeded", retry_after_s=wait_s)  # fmt: skip


def _require_room(num_running: int, wanted: int, most: int) -> None:
    if wanted > most:
        raise ApiError(400, f"the request asks for {wanted} answers at once, and this key may have {most}; ask for "
                            "fewer", "too_many_answers")  # fmt: skip
    if num_running + wanted > most:
        raise ApiError(429, f"{num_running} answers of this key wait or run, and it may have {most} at once; try again "
                            "when some have ended", "rate_limit_exceeded", retry_after_s=_BUSY_S)  # fmt: skip


_ROUNDING = 1e-9  # of a bucket: a client that waited as long as the header said is not refused for a rounding error


class Bucket:
    """Filled evenly, `per_minute` in 60 s, and never above that. What is taken may leave it in debt."""

    def __init__(self, per_minute: float, now: float) -> None:
        self.per_minute = per_minute
        self._level = per_minute
        self._time = now  # seconds, of the level

    def level(self, now: float) -> float:
        """What is in it; negative in debt. A clock that went back changes nothing."""
        passed = max(0.0, now - self._time)
        return min(self.per_minute, self._level + passed * self.per_minute / 60)

    def take(self, amount: float, now: float) -> None:
        """Take so much, whether it is there or not."""
        self._level = self.level(now) - amount
        self._time = max(self._time, now)

    def wait_s(self, wanted: float, now: float) -> float:
        """Seconds until `wanted` (at most `per_minute`) will be in it; 0 where it is."""
        missing = wanted - self.level(now)
        return missing * 60 / self.per_minute if missing > _ROUNDING * self.per_minute else 0.0


def count_request(request: Request, limiter: RateLimiter, client: Client) -> None:
    """Count a request, and keep the headers for its answer. Raises ApiError 429."""
    try:
        limiter.request(client)
    finally:
        request.state.rate_limit_headers = limiter.headers(client)


def rate_limit_headers(scope: Scope) -> Mapping[str, str]:
    """The headers that `count_request` has kept; none for a request that was not counted."""
    found: Mapping[str, str] = scope.get("state", {}).get("rate_limit_headers", {})
    return found

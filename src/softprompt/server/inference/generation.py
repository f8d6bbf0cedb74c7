"""One HTTP request for generation: its engine requests, its usage, and what is counted, limited and logged of it."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from softprompt.engine import Aborted, AsyncEngine, Failed, Finished, Pooled, PromptLogprobs, Request, Tokens
from softprompt.errors import SoftpromptError
from softprompt.server.clients.keys import Client
from softprompt.server.clients.rate_limits import RateLimiter
from softprompt.server.errors import ApiError
from softprompt.server.lifecycle import stopping
from softprompt.server.prompts.model import Model
from softprompt.server.telemetry.metrics import End, GenerationMetrics, Metrics
from softprompt.server.telemetry.request_log import RequestLog

GenerationEvent = Tokens | PromptLogprobs | Finished


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """What the client wants of the answers beside their text."""

    is_stream: bool = False
    has_logprobs: bool = False
    has_usage: bool = False  # the stream's last event has the usage
    has_continuous_usage: bool = False  # and so has every other
    stop_ids: frozenset[int] = frozenset()  # the base's own ends of text: no `stop_reason`
    echoes: tuple[str, ...] | None = None  # the text of each request, if it stands before its answers


@dataclass(kw_only=True)
class Generation:
    """Its requests run in the engine side by side. Choice i of request r has the index r * num_choices + i."""

    client: Client
    model: Model
    fingerprint: str  # of base and soft prompt
    requests: Sequence[Request]
    output: OutputOptions
    engine: AsyncEngine
    limiter: RateLimiter
    metrics: Metrics
    log: RequestLog
    began: float = field(default_factory=time.perf_counter)  # seconds, of that clock
    num_cached_tokens: int = 0  # prompt tokens whose keys and values came from the prefix cache
    _counts: GenerationMetrics | None = None  # from the first event on

    @property
    def num_choices(self) -> int:
        """Answers per request."""
        return self.requests[0].num_choices

    @property
    def num_prompt_tokens(self) -> int:
        """Of all texts, without virtual tokens."""
        return sum(len(request.ids) for request in self.requests)

    @property
    def num_virtual_tokens(self) -> int:
        """Of the soft prompt, once for each text."""
        return sum(request.num_virtual for request in self.requests)

    @property
    def num_new_tokens(self) -> int:
        """Tokens generated so far."""
        return 0 if self._counts is None else self._counts.num_tokens

    async def events(self) -> AsyncGenerator[tuple[int, GenerationEvent], None]:
        """(index of the request, event) as they come; one Finished ends each request. Closing it aborts the rest.

        No event comes before the engine has admitted all requests. Raises ApiError 429 if the client is over its
        limits, what `AsyncEngine.generate_all` raises, and ApiError 400, 408, 500 or 503 if a request ends unanswered.
        """
        num_answers = len(self.requests) * self.num_choices
        self.limiter.admit(self.client, num_answers=num_answers, num_tokens=self.num_prompt_tokens)
        counts = self._counts = self.metrics.generation_started(self.model.id)
        if self.model.alias is not None:
            self.metrics.drawn(self.model.alias, self.model.id)
        end: End | None = "abort"  # None: refused, so there was no generation
        last_end: End = "stop"
        try:
            async with aclosing(self.engine.generate_all(self.requests)) as events:
                async for index, event in events:
                    if isinstance(event, Failed | Aborted):
                        raise error_for(event, self.requests[index].timeout_s)
                    assert not isinstance(event, Pooled), "nothing here is pooled"
                    if isinstance(event, Tokens) and event.num_generated:
                        counts.tokens(event.num_generated)
                    elif isinstance(event, Finished):
                        self.num_cached_tokens += event.num_cached_tokens
                        last_end = event.answers[-1].finish_reason
                    yield index, event
            end = last_end
        except Exception as error:
            end = None if isinstance(error, SoftpromptError) and not self.num_new_tokens else "error"
            raise
        finally:
            if end is not None:
                counts.ended(end, self.num_prompt_tokens, self.num_virtual_tokens)
            self.limiter.ended(self.client, num_answers=num_answers, num_tokens=self.num_new_tokens)
            self._write_log()

    def _write_log(self) -> None:
        self.log.model = self.model.id
        self.log.num_prompt_tokens = self.num_prompt_tokens
        self.log.num_new_tokens = self.num_new_tokens


def error_for(end: Failed | Aborted, timeout_s: float | None) -> ApiError:
    """What the client gets for a request that ended without an answer."""
    if isinstance(end, Failed):
        if end.is_request_fault:
            return ApiError(400, end.why, "invalid_value", "response_format")
        return ApiError(500, f"the answer could not be generated: {end.why}", "generation_failed")
    if end.reason == "deadline":
        why = f"the answer took longer than {timeout_s:g} s, waiting included; ask for fewer tokens"
        return ApiError(408, why, "timeout")
    return stopping()

"""What the metrics learn of a call: its model, each token as it comes, and how it ended."""

from __future__ import annotations

from fastapi import Request

from softprompt.engine import Finished, Tokens
from softprompt.server.dependencies import dependency_if_any
from softprompt.server.inference.call import Call, Told
from softprompt.server.telemetry.metrics import End, GenerationMetrics, Metrics

_NOT_ANSWERED: dict[str | None, End] = {"failed": "error", "refused": "error", "left": "abort"}


class Counting:
    """Of one call. An app without metrics counts nothing."""

    def __init__(self, http: Request, call: Call) -> None:
        metrics = dependency_if_any(http.app, Metrics)
        self._generation: GenerationMetrics | None = (
            None if metrics is None else metrics.generation_started(call.model.id)
        )
        self._how: End = "stop"
        if metrics is not None and call.model.alias is not None:
            metrics.drawn(call.model.alias, call.model.id)

    def take(self, told: Told) -> None:
        """What is being told; of several answers the last one says how the call ended."""
        _, event = told
        if isinstance(event, Finished):
            self._how = event.answers[-1].finish_reason
        elif isinstance(event, Tokens) and event.num_generated and self._generation is not None:
            self._generation.tokens(event.num_generated)

    def end(self, call: Call) -> None:
        """Refused before it began: not a generation at all."""
        if self._generation is not None and (call.outcome != "refused" or call.num_new_tokens > 0):
            how = _NOT_ANSWERED.get(call.outcome, self._how)
            self._generation.ended(how, call.num_prompt_tokens, call.num_virtual_tokens)

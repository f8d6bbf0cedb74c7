"""One HTTP call that asks for answers: who asks, of which model, and what became of it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Literal

from softprompt.engine import Finished, PromptLogprobs, Request, Tokens
from softprompt.server.clients.keys import Client
from softprompt.server.prompts.model import Model

Endpoint = Literal["completions", "chat"]
Outcome = Literal["answered", "refused", "failed", "left"]  # left: the client hung up, or the server was stopped
What = Tokens | PromptLogprobs | Finished
Told = tuple[int, What]  # which of the call's requests, and what came of it


@dataclass(kw_only=True)
class Call:
    """Its requests run at once in the engine. Counts grow as answers come."""

    endpoint: Endpoint
    client: Client
    model: Model
    requests: tuple[Request, ...]
    began: float = field(default_factory=time.perf_counter)  # seconds, of that clock
    first_token: float | None = None  # the same clock
    num_new_tokens: int = 0
    num_cached_tokens: int = 0  # of its texts, from the prefix cache
    outcome: Outcome | None = None  # None while it runs

    @property
    def num_choices(self) -> int:
        """Answers per request."""
        return self.requests[0].num_choices

    @property
    def num_prompt_tokens(self) -> int:
        """Of all its texts, virtual ones apart."""
        return sum(len(request.ids) for request in self.requests)

    @property
    def num_virtual_tokens(self) -> int:
        """Of all its texts' soft prompts."""
        prompt = self.model.prompt
        return 0 if prompt is None else prompt.num_virtual_tokens * len(self.requests)

    def take(self, event: What) -> None:
        """Count what came."""
        if isinstance(event, Tokens) and event.num_generated:
            self.num_new_tokens += event.num_generated
            if self.first_token is None:
                self.first_token = time.perf_counter()
        if isinstance(event, Finished):
            self.num_cached_tokens += event.num_cached_tokens

"""What both endpoints work with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from softprompt.base import Base
from softprompt.config import SamplingConfig, ServerConfig
from softprompt.engine import AsyncEngine
from softprompt.engine import Request as EngineRequest
from softprompt.server.clients.auth import CurrentClient
from softprompt.server.clients.keys import Client
from softprompt.server.dependencies import dependency
from softprompt.server.inference.call import Call, Endpoint
from softprompt.server.inference.fields import GenerationBody
from softprompt.server.inference.reading import Readers, Reading
from softprompt.server.inference.sampling import check_body
from softprompt.server.inference.serving import Asked
from softprompt.server.inference.shape import Shape, Writer
from softprompt.server.inference.token_text import TokenTexts
from softprompt.server.prompts.model import Model
from softprompt.server.prompts.registry import PromptRegistry
from softprompt.server.telemetry.request_log import CurrentRequestLog, RequestLog


@dataclass(frozen=True)
class Parts:
    """Of the app, and of the request that is being answered."""

    http: Request
    client: Client
    notes: RequestLog
    base: Base
    config: ServerConfig
    engine: AsyncEngine
    registry: PromptRegistry
    texts: TokenTexts
    readers: Readers

    def reading(self) -> Reading:
        return Reading(self.base, self.readers, self.client.id, self.http.receive)

    def model_of(self, body: GenerationBody) -> Model:
        """The model that is asked for, its body's fields checked. Raises ApiError."""
        model = self.registry.resolve(body.model, self.client, body.user)
        check_body(body, self.base, self.client)
        return model

    def request(
        self, body: GenerationBody, model: Model, ids: tuple[int, ...], sampling: SamplingConfig, num_tops: int | None
    ) -> EngineRequest:
        """One text's request; `num_tops` likeliest tokens are reported beside each token, None for no report."""
        return EngineRequest(
            ids=ids,
            prompt=model.prompt,
            sampling=sampling,
            num_choices=body.n,
            num_log_probs=None if num_tops is None else min(num_tops, self.base.vocab_size),
            client=self.client.id,
            cache_salt=self._cache_salt(body),
            priority=body.priority,
            timeout_s=self.config.request_timeout_s,
        )

    def _cache_salt(self, body: GenerationBody) -> str | None:
        """Texts are cached for one key alone, unless the operator has them shared, and for one salt of it."""
        if self.config.share_prefix_cache:
            return body.cache_salt
        return f"{self.client.id}\0{body.cache_salt or ''}"  # ids have no NUL, and a salt is not empty

    def call(self, endpoint: Endpoint, model: Model, requests: list[EngineRequest]) -> Call:
        return Call(endpoint=endpoint, client=self.client, model=model, requests=tuple(requests))

    def writer(self, body: GenerationBody, call: Call, shape: Shape, has_reports: bool) -> Writer:
        options = body.stream_options
        tells_usage = options is not None and options.include_usage
        return Writer(
            call=call,
            shape=shape,
            fingerprint=call.model.fingerprint(self.base),
            stop_ids=frozenset(self.base.stop_ids) - frozenset(body.stop_token_ids),
            has_reports=has_reports,
            tells_usage=tells_usage,
            tells_usage_always=tells_usage and options is not None and options.continuous_usage_stats,
        )

    def asked(self, body: GenerationBody) -> Asked:
        return Asked(self.http, self.engine, self.notes, body.stream)


async def _parts(
    http: Request,
    client: CurrentClient,
    notes: CurrentRequestLog,
    base: Annotated[Base, dependency(Base)],
    config: Annotated[ServerConfig, dependency(ServerConfig)],
    engine: Annotated[AsyncEngine, dependency(AsyncEngine)],
    registry: Annotated[PromptRegistry, dependency(PromptRegistry)],
    texts: Annotated[TokenTexts, dependency(TokenTexts)],
    readers: Annotated[Readers, dependency(Readers)],
) -> Parts:
    return Parts(http, client, notes, base, config, engine, registry, texts, readers)


TheParts = Annotated[Parts, Depends(_parts)]

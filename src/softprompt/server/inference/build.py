"""A request's body as engine requests: the model that it names, its texts tokenised, its fields as sampling settings.

The body is read here and nowhere else. The engine judges what it can answer; its errors get the names of HTTP's fields.
"""

import json
import re
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request

from softprompt.base import Base
from softprompt.config import SamplingConfig, ServerConfig
from softprompt.engine import AsyncEngine
from softprompt.engine import Request as EngineRequest
from softprompt.errors import SoftpromptError
from softprompt.server.clients.auth import CurrentClient
from softprompt.server.clients.rate_limits import RateLimiter
from softprompt.server.dependencies import dependency
from softprompt.server.errors import ApiError
from softprompt.server.inference.generation import Generation, OutputOptions
from softprompt.server.inference.logprobs import TokenTexts
from softprompt.server.inference.pooling_schema import PoolingBody
from softprompt.server.inference.respond import ClientDisconnectedError, unless_disconnected
from softprompt.server.inference.schema import ChatBody, CompletionBody, GenerationBody, Message, check_supported
from softprompt.server.inference.tokenise import (
    LONG,
    TokeniserPool,
    chat_ids,
    chat_size,
    num_characters_of,
    prompt_ids,
    prompt_items,
)
from softprompt.server.prompts.capabilities import require
from softprompt.server.prompts.model import Model
from softprompt.server.prompts.registry import PromptRegistry
from softprompt.server.telemetry.metrics import Metrics
from softprompt.server.telemetry.request_log import CurrentRequestLog

Result = TypeVar("Result")

MOST_ANSWERS = 1024  # of one HTTP request
_MOST_ECHOED = 2**18  # log-probabilities of one request's texts, repeated before each answer
_LONGEST_GUIDE = 32_000  # characters; compiling one takes some of the engine's time
_SEEDS = 2**63  # the engine's seeds are 0 or more, OpenAI's may be negative
_ANY_OBJECT = '{"type": "object"}'
_FIELDS = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens", "stop_ids": "stop_token_ids"}
_SETTING = re.compile(rf"\b({'|'.join(_FIELDS)})\b")


@dataclass(frozen=True)
class InferenceDependencies:
    """What the endpoints work with: of the request, and of the app."""

    http: Request
    client: CurrentClient
    log: CurrentRequestLog
    base: Annotated[Base, dependency(Base)]
    config: Annotated[ServerConfig, dependency(ServerConfig)]
    engine: Annotated[AsyncEngine, dependency(AsyncEngine)]
    registry: Annotated[PromptRegistry, dependency(PromptRegistry)]
    texts: Annotated[TokenTexts, dependency(TokenTexts)]
    tokenisers: Annotated[TokeniserPool, dependency(TokeniserPool)]
    limiter: Annotated[RateLimiter, dependency(RateLimiter)]
    metrics: Annotated[Metrics, dependency(Metrics)]


CurrentDependencies = Annotated[InferenceDependencies, Depends()]


async def build_completion(body: CompletionBody, deps: InferenceDependencies) -> Generation:
    """One engine request for each text. Raises ApiError."""
    model = _model(body, deps)
    _check_completion(body, deps.base)
    items = prompt_items(body.prompt, deps.base, deps.tokenisers.max_characters)
    _check_num_answers(len(items), body.n)
    sampling = _sampling(body, max(1, body.max_tokens))

    def work() -> list[EngineRequest]:
        found = []
        for number, item in enumerate(items):
            ids = prompt_ids(deps.base, item, number, body.add_special_tokens)
            is_seeded = body.seed is not None or number == 0  # without a seed each text samples with its own
            seeded = sampling if is_seeded else replace(sampling, seed=_random_seed())
            request = _engine_request(body, deps, model, ids, seeded, body.logprobs)
            if body.echo:
                request = replace(request, num_text_log_probs=request.num_log_probs, is_text_only=not body.max_tokens)
            deps.engine.check(request)
            found.append(request)
        return found

    requests = await tokenised(deps, num_characters_of(items), work)
    echoes = None
    if body.echo:
        _check_num_echoed(sum(len(request.ids) for request in requests), body)
        echoes = tuple(
            item if isinstance(item, str) else deps.base.decode(request.ids)
            for item, request in zip(items, requests, strict=True)
        )
    return _generation(body, deps, model, requests, body.logprobs is not None, echoes)


async def build_chat(body: ChatBody, deps: InferenceDependencies) -> Generation:
    """One engine request for the conversation. Raises ApiError."""
    model = _model(body, deps)
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs to be true", "invalid_value", "top_logprobs")
    num_tops = (body.top_logprobs or 0) if body.logprobs else None
    form = None if model.prompt is None else model.prompt.record.form
    messages = [_message(message) for message in body.messages]
    size = chat_size(deps.base, form, messages, deps.tokenisers.max_chat_characters)

    def work() -> EngineRequest:
        ids = chat_ids(deps.base, form, messages)
        sampling = _sampling(body, _max_tokens(body, deps, model, ids))
        request = _engine_request(body, deps, model, ids, sampling, num_tops)
        deps.engine.check(request)
        return request

    return _generation(body, deps, model, [await tokenised(deps, size, work)], num_tops is not None)


def _model(body: GenerationBody, deps: InferenceDependencies) -> Model:
    """The model, with the fields checked that neither pydantic nor the engine can judge."""
    model = resolve_model(body, deps)
    require(model, deps.base, "generate")
    if body.structured_outputs is not None:
        check_supported(body.structured_outputs.model_extra)
    if body.stream_options is not None and not body.stream:
        raise ApiError(
            400, "stream_options is for streams; set stream to true, or leave it out", None, "stream_options"
        )
    return model


def resolve_model(body: GenerationBody | PoolingBody, deps: InferenceDependencies) -> Model:
    """The model that a body names. Raises ApiError, also for fields that are not supported."""
    model = deps.registry.resolve(body.model, deps.client, body.user)
    check_supported(body.model_extra)
    if body.priority < 0 and not deps.client.is_admin:
        raise ApiError(
            400, f"priority is {body.priority}; without an admin's key it must be 0 or more", None, "priority"
        )
    return model


def _check_completion(body: CompletionBody, base: Base) -> None:
    if body.echo and base.kind == "seq2seq":
        raise ApiError(400, "echo is not supported on an encoder-decoder, whose answer does not continue its text; "
                            "leave it out", "unsupported_parameter", "echo")  # fmt: skip
    if body.best_of is not None and body.best_of != body.n:
        raise ApiError(400, f"best_of is {body.best_of} and n is {body.n}; every answer is returned; leave best_of out",
                       "unsupported_parameter", "best_of")  # fmt: skip
    if body.max_tokens == 0 and not body.echo:
        raise ApiError(400, "max_tokens is 0; it must be at least 1, or echo must be true", "invalid_value",
                       "max_tokens")  # fmt: skip


def _check_num_answers(num_texts: int, n: int) -> None:
    if num_texts * n > MOST_ANSWERS:
        raise ApiError(400, f"{num_texts} texts with n = {n} are {num_texts * n} answers; one request may ask for "
                            f"{MOST_ANSWERS}", "invalid_value", "n")  # fmt: skip


def _check_num_echoed(num_ids: int, body: CompletionBody) -> None:
    if body.logprobs is None:
        return
    wanted = num_ids * body.n * (1 + body.logprobs)
    if wanted > _MOST_ECHOED:
        raise ApiError(400, f"echo with {num_ids} tokens, n = {body.n} and logprobs = {body.logprobs} is {wanted} "
                            f"log-probabilities; one request may ask for {_MOST_ECHOED}; send fewer texts at once",
                       "invalid_value", "echo")  # fmt: skip


def _message(message: Message) -> dict[str, Any]:  # Any: a chat template's own
    check_supported(message.model_extra)
    more = {"name": message.name, "tool_calls": message.tool_calls, "tool_call_id": message.tool_call_id}
    return {"role": message.role, "content": _content(message), **{key: value for key, value in more.items() if value}}


def _content(message: Message) -> str:
    if isinstance(message.content, str):
        return message.content
    for part in message.content:
        if part.type != "text" or part.text is None:
            raise ApiError(400, f"a message has a part of type {part.type[:32]!r}; the base reads text only",
                           "unsupported_parameter", "messages")  # fmt: skip
    return "\n".join(part.text or "" for part in message.content)


def _max_tokens(body: ChatBody, deps: InferenceDependencies, model: Model, ids: tuple[int, ...]) -> int:
    """By default as many as the base has positions left, but 1: the engine refuses a text that leaves none."""
    if body.max_completion_tokens is not None:
        return body.max_completion_tokens
    if body.max_tokens is not None:
        return body.max_tokens
    num_virtual = 0 if model.prompt is None else model.prompt.num_virtual_tokens
    num_before = num_virtual + len(ids)
    if deps.base.kind == "seq2seq":  # the answer has positions of its own
        num_decoder = 0 if model.prompt is None else model.prompt.num_decoder_tokens
        num_before = num_decoder + len(deps.base.decoder_start_ids)
    return max(1, deps.base.max_length - num_before)


async def tokenised(deps: InferenceDependencies, num_characters: int, work: Callable[[], Result]) -> Result:
    """The work's result. Raises ApiError for what the engine refuses, and 499 if the client disconnects meanwhile."""
    try:
        if num_characters <= LONG:
            return work()
        return await unless_disconnected(deps.http.receive, deps.tokenisers.run(deps.client.id, work))
    except ClientDisconnectedError:
        raise ApiError(499, "the client disconnected while its input was read") from None
    except SoftpromptError as error:
        raise _named_as_fields(error) from error


def _named_as_fields(error: SoftpromptError) -> ApiError:
    """An error with HTTP's names for the settings; one about a field is about its value."""
    found = ApiError.of(error)
    if found.param is None:
        return found
    message = _SETTING.sub(lambda match: _FIELDS[match[0]], found.message)
    code = "invalid_value" if found.code == "invalid_data" else found.code
    return replace(found, message=message, param=_FIELDS.get(found.param, found.param), code=code)


def _engine_request(
    body: GenerationBody,
    deps: InferenceDependencies,
    model: Model,
    ids: tuple[int, ...],
    sampling: SamplingConfig,
    num_tops: int | None,
) -> EngineRequest:
    """`num_tops`: alternatives beside each token's log-probability; None for no log-probabilities."""
    return EngineRequest(
        ids=ids,
        prompt=model.prompt,
        sampling=sampling,
        num_choices=body.n,
        num_log_probs=None if num_tops is None else min(num_tops, deps.base.vocab_size),
        client=deps.client.id,
        cache_salt=_cache_salt(body, deps),
        priority=body.priority,
        timeout_s=deps.config.request_timeout_s,
    )


def _cache_salt(body: GenerationBody, deps: InferenceDependencies) -> str | None:
    """Cached texts are one key's alone, unless the operator shares them, and of one salt of it."""
    if deps.config.share_prefix_cache:
        return body.cache_salt
    return f"{deps.client.id}\0{body.cache_salt or ''}"  # ids have no NUL, and a salt is not empty


def _generation(
    body: GenerationBody,
    deps: InferenceDependencies,
    model: Model,
    requests: list[EngineRequest],
    has_logprobs: bool,
    echoes: tuple[str, ...] | None = None,
) -> Generation:
    options = body.stream_options
    has_usage = options is not None and options.include_usage
    output = OutputOptions(
        is_stream=body.stream,
        has_logprobs=has_logprobs,
        has_usage=has_usage,
        has_continuous_usage=has_usage and options is not None and options.continuous_usage_stats,
        stop_ids=frozenset(deps.base.stop_ids) - frozenset(body.stop_token_ids),
        echoes=echoes,
    )
    fingerprint = model.fingerprint(deps.base, deps.engine.weights)
    return Generation(
        client=deps.client, model=model, fingerprint=fingerprint, requests=requests, output=output, engine=deps.engine,
        limiter=deps.limiter, metrics=deps.metrics, log=deps.log,
    )  # fmt: skip


def _sampling(body: GenerationBody, max_tokens: int) -> SamplingConfig:
    """The engine's settings. Raises ApiError 400."""
    choice, schema = _choice(body), _schema(body)
    try:
        return SamplingConfig(
            max_new_tokens=max_tokens,
            min_new_tokens=body.min_tokens,
            temperature=body.temperature,
            top_p=body.top_p,
            top_k=max(0, body.top_k),
            min_p=body.min_p,
            repetition_penalty=body.repetition_penalty,
            presence_penalty=body.presence_penalty,
            frequency_penalty=body.frequency_penalty,
            stop=tuple(body.stop),
            stop_ids=tuple(body.stop_token_ids),
            ignore_eos=body.ignore_eos,
            choice=choice,
            json_schema=schema,
            logit_bias=body.logit_bias,
            seed=_random_seed() if body.seed is None else body.seed % _SEEDS,
        )
    except SoftpromptError as error:
        raise _named_as_fields(error) from error


def _random_seed() -> int:
    return secrets.randbits(62)


def _choice(body: GenerationBody) -> tuple[str, ...]:
    given = body.structured_outputs.choice if body.structured_outputs is not None else None
    choice = tuple(given or body.guided_choice or ())
    _check_guide_size("the choice", map(len, choice))
    return choice


def _schema(body: GenerationBody) -> str | None:
    """The JSON schema of the answer, as text."""
    structured = body.structured_outputs.json_ if body.structured_outputs is not None else None
    given = [schema for schema in (_response_format(body), structured, body.guided_json) if schema is not None]
    if len(given) > 1:
        raise ApiError(400, "more than one JSON schema is asked for; use response_format alone", "invalid_value")
    return _as_text(given[0]) if given else None


def _response_format(body: GenerationBody) -> Any | None:  # Any: JSON
    wanted = body.response_format
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return _ANY_OBJECT
    if wanted.json_schema is None:
        raise ApiError(400, "response_format of type json_schema needs json_schema, {\"name\": ..., \"schema\": ...}",
                       "invalid_value", "response_format")  # fmt: skip
    return wanted.json_schema.schema_


def _as_text(schema: Any) -> str:  # Any: JSON
    try:
        text = schema if isinstance(schema, str) else json.dumps(schema, allow_nan=False)
    except (ValueError, RecursionError):
        raise ApiError(400, "the JSON schema holds NaN or is nested too deeply", "invalid_value") from None
    _check_guide_size("the JSON schema", (len(text),))
    return text


def _check_guide_size(what: str, sizes: Iterable[int]) -> None:
    num_characters = sum(sizes)
    if num_characters > _LONGEST_GUIDE:
        raise ApiError(400, f"{what} has {num_characters} characters; the most allowed is {_LONGEST_GUIDE}",
                       "invalid_value")  # fmt: skip

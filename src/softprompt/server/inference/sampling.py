"""A body's fields as the engine's settings."""

from __future__ import annotations

import json
import secrets
from dataclasses import replace
from typing import Any

from softprompt.base import Base
from softprompt.config import SamplingConfig
from softprompt.server.clients.keys import Client
from softprompt.server.errors import ApiError
from softprompt.server.inference.fields import GenerationBody
from softprompt.server.inference.refused import refuse

_LONGEST_GUIDE = 32_000  # characters; compiling one takes some of the engine's time
_SEEDS = 2**63  # the engine has none below 0, OpenAI's clients have
_ANY_OBJECT = '{"type": "object"}'


def check_body(body: GenerationBody, base: Base, client: Client) -> None:
    """Raises ApiError 400 for what neither pydantic nor the engine sees."""
    refuse(body.model_extra)
    if body.structured_outputs is not None:
        refuse(body.structured_outputs.model_extra)
    if body.stream_options is not None and not body.stream:
        raise ApiError(
            400, "stream_options is for streams; set stream to true, or leave it out", None, "stream_options"
        )
    if body.priority < 0 and not client.is_admin:
        raise ApiError(
            400, f"priority is {body.priority}; without an admin's key it must be 0 or more", None, "priority"
        )
    foreign = next((token for token in body.stop_token_ids if token >= base.vocab_size), None)
    if foreign is not None:
        raise ApiError(400, f"stop_token_ids has {foreign}; the base's ids are 0 to {base.vocab_size - 1}",
                       "invalid_value", "stop_token_ids")  # fmt: skip


def sampling_of(body: GenerationBody, max_tokens: int) -> SamplingConfig:
    """The engine's settings. Raises ApiError 400, and ConfigError for what cannot be meant together."""
    if body.min_tokens > max_tokens:
        raise ApiError(400, f"min_tokens is {body.min_tokens}; it must be at most max_tokens, {max_tokens} here",
                       "invalid_value", "min_tokens")  # fmt: skip
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
        choice=_choice(body),
        json_schema=_schema(body),
        logit_bias=body.logit_bias,
        seed=_random_seed() if body.seed is None else body.seed % _SEEDS,
    )


def reseeded(body: GenerationBody, sampling: SamplingConfig) -> SamplingConfig:
    """The settings for one of several texts: where no seed is given each draws by its own."""
    return replace(sampling, seed=_random_seed()) if body.seed is None else sampling


def _random_seed() -> int:
    return secrets.randbits(62)


def _choice(body: GenerationBody) -> tuple[str, ...]:
    told = body.structured_outputs.choice if body.structured_outputs is not None else None
    choice = tuple(told or body.guided_choice or ())
    _check_size("the choice", sum(map(len, choice)))
    return choice


def _schema(body: GenerationBody) -> str | None:
    """The one JSON schema that is asked for, as text."""
    structured = body.structured_outputs.json_ if body.structured_outputs is not None else None
    given = [schema for schema in (_formatted(body), structured, body.guided_json) if schema is not None]
    if len(given) > 1:
        raise ApiError(400, "more than one JSON schema is asked for; use response_format alone", "invalid_value")
    return _as_text(given[0]) if given else None


def _formatted(body: GenerationBody) -> Any | None:  # Any: JSON
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
    _check_size("the JSON schema", len(text))
    return text


def _check_size(what: str, num_characters: int) -> None:
    if num_characters > _LONGEST_GUIDE:
        raise ApiError(400, f"{what} has {num_characters} characters; at most {_LONGEST_GUIDE} are taken",
                       "invalid_value")  # fmt: skip

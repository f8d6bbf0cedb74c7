"""What a body may hold to say how an answer is chosen: OpenAI's fields, and vLLM's beside them.

Limits stand here where a client could otherwise make the engine's thread work for long.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

MOST_CHOICES = 128
_MOST_STOPS, _LONGEST_STOP = 64, 256
_MOST_STOP_IDS = 1024
_MOST_GUIDED, _LONGEST_GUIDED = 1024, 4096
_PRIORITIES = 2**31
_LARGEST_BIAS = 100.0
_LONGEST_SALT = 1024
_LARGEST = 1e6  # what float32 divides by without a fuss

Json = dict[str, Any]


def _one_or_more(value: Any) -> Any:  # Any: checked behind
    """One string stands for a list of it, and an empty one, as in OpenAI's API, for none."""
    return [value] if isinstance(value, str) and value else [] if value == "" else value


def _biases(value: Any) -> tuple[tuple[int, float], ...]:  # Any: checked here, so that no client's key is told back
    if not isinstance(value, dict | tuple):
        raise PydanticCustomError("logit_bias", 'must be an object of token ids and numbers, such as {{"50256": -100}}')
    try:
        found = tuple(
            (int(token), float(bias)) for token, bias in dict(value).items() if not isinstance(bias, str | bool)
        )
    except (TypeError, ValueError, OverflowError):
        found = ()
    if len(found) != len(value) or not all(abs(bias) <= _LARGEST_BIAS for _, bias in found):
        raise PydanticCustomError("logit_bias", "must give each token id, a whole number, a number from -100 to 100")
    return found


Stops = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=_LONGEST_STOP)]],
    BeforeValidator(_one_or_more),
    Field(max_length=_MOST_STOPS),
    WithJsonSchema(
        {"anyOf": [{"type": "string", "maxLength": _LONGEST_STOP},
                   {"type": "array", "maxItems": _MOST_STOPS,
                    "items": {"type": "string", "minLength": 1, "maxLength": _LONGEST_STOP}}]}
    ),
]  # fmt: skip
Choices = Annotated[list[Annotated[str, Field(min_length=1, max_length=_LONGEST_GUIDED)]],
                    Field(min_length=1, max_length=_MOST_GUIDED)]  # fmt: skip
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Biases = Annotated[
    tuple[tuple[int, float], ...],
    BeforeValidator(_biases),
    WithJsonSchema({"type": "object", "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100}}),
]


class Body(BaseModel):
    """A field that is null counts as not given."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, body: Any) -> Any:  # Any: checked by pydantic
        return {key: value for key, value in body.items() if value is not None} if isinstance(body, dict) else body


class StreamOptions(Body):
    """What a stream tells beside the answer."""

    include_usage: bool = Field(False, description="Send one more event with the usage before the stream's end.")
    continuous_usage_stats: bool = Field(False, description="With `include_usage`: the usage so far in every event.")


class NamedSchema(Body):
    """A JSON schema as `response_format` holds it."""

    name: str = Field("answer", description="For people; it changes nothing.", max_length=256)
    schema_: Json | bool = Field(alias="schema", description="The JSON schema that the answer satisfies.")


class ResponseFormat(Body):
    """What the answer must be."""

    type: Literal["text", "json_object", "json_schema"] = Field(description="Form of the answer.")
    json_schema: NamedSchema | None = Field(None, description="The schema of type `json_schema`.")


class StructuredOutputs(Body):
    """vLLM's form of the same."""

    choice: Choices | None = Field(None, description="The answer is one of these.")
    json_: str | Json | bool | None = Field(None, alias="json", description="A JSON schema, or its text.")


class GenerationBody(Body):
    """Fields that both endpoints have. Unknown ones are ignored."""

    model: str = Field(description="Name of a soft prompt, or of the base (`base` always means it).", max_length=512)
    n: int = Field(1, ge=1, le=MOST_CHOICES, description="Answers per text; number i draws with `seed` + i.")
    temperature: float = Field(
        1.0, ge=0, le=_LARGEST, description="0 is greedy; above it, sample with this temperature."
    )
    top_p: float = Field(1.0, gt=0, le=1, description="Sample from the likeliest tokens that hold this share.")
    top_k: int = Field(0, ge=-1, description="Sample from the K likeliest tokens; 0 or -1 is off.")
    min_p: float = Field(0.0, ge=0, le=1, description="Sample from tokens this times as likely as the likeliest.")
    repetition_penalty: float = Field(
        1.0, ge=1 / _LARGEST, le=_LARGEST, description="Above 1, tokens that were there become less likely."
    )
    presence_penalty: float = Field(0.0, ge=-2, le=2, description="Taken from the logit of a token already answered.")
    frequency_penalty: float = Field(0.0, ge=-2, le=2, description="The same for each time that it was.")
    logit_bias: Biases = Field((), description="Token ids, and what is added to their logits.")
    seed: int | None = Field(None, ge=-(2**63), lt=2**63,
                             description="Seed of the sampling; default: another each time.")  # fmt: skip
    stop: Stops = Field([], description="End before one of these strings.")
    stop_token_ids: list[TokenId] = Field([], max_length=_MOST_STOP_IDS, description="End at one of these tokens too.")
    min_tokens: int = Field(0, ge=0, description="No end and no stop string before this many tokens.")
    ignore_eos: bool = Field(False, description="Go on behind the base's end of text.")
    priority: int = Field(0, gt=-_PRIORITIES, lt=_PRIORITIES,
                          description="Lower is served first; below 0 for admin keys only.")  # fmt: skip
    stream: bool = Field(False, description="Send the answer as server-sent events while it is made.")
    stream_options: StreamOptions | None = Field(None, description="Only with `stream`.")
    response_format: ResponseFormat | None = Field(None, description="Make the answer JSON, by a schema or any.")
    structured_outputs: StructuredOutputs | None = Field(None, description="vLLM's way to say so: `choice` or `json`.")
    guided_choice: Choices | None = Field(None, description="vLLM's older form of `structured_outputs.choice`.")
    guided_json: str | Json | bool | None = Field(None, description="vLLM's older form of `structured_outputs.json`.")
    cache_salt: str | None = Field(None, min_length=1, max_length=_LONGEST_SALT, description="vLLM's: only your "
                                   "requests with the same salt reuse each other's cached texts.")  # fmt: skip
    user: str | None = Field(None, description="Who asks: an alias that shares its requests out stays with one model.")

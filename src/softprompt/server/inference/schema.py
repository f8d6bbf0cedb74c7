"""The bodies of /v1/completions and /v1/chat/completions: OpenAI's fields, vLLM's beside them, and those not supported.

pydantic checks types and shapes, and the limits of the API itself: those that its description publishes, and those
that keep one body from occupying the engine's thread for long. Whether a base can answer, the engine alone decides.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator
from pydantic.config import JsonDict
from pydantic_core import PydanticCustomError

from softprompt.server.errors import ApiError

MOST_CHOICES = 128
MOST_TEXTS = 1024
_MOST_STOPS, _LONGEST_STOP = 64, 256
_MOST_STOP_IDS = 1024
_MOST_GUIDED, _LONGEST_GUIDED = 1024, 4096
PRIORITIES = 2**31
_LARGEST_BIAS = 100.0
_LONGEST_SALT = 1024
_LARGEST = 1e6  # float32 logits stay finite when divided or multiplied by it

Json = dict[str, Any]


def _one_or_more(value: Any) -> Any:  # Any: checked afterwards
    """One string stands for a list of it, and an empty one, as in OpenAI's API, for none."""
    return [value] if isinstance(value, str) and value else [] if value == "" else value


def _biases(value: Any) -> tuple[tuple[int, float], ...]:  # Any: checked here, so that no key of a client is quoted
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
    """What a stream has beside the answer."""

    include_usage: bool = Field(False, description="Send one more event with the usage before the stream's end.")
    continuous_usage_stats: bool = Field(False, description="With `include_usage`: the usage so far in every event.")


class NamedSchema(Body):
    """A JSON schema in `response_format`."""

    name: str = Field("answer", description="For humans; it changes nothing.", max_length=256)
    schema_: Json | bool = Field(alias="schema", description="The JSON schema that the answer satisfies.")


class ResponseFormat(Body):
    """The required form of the answer."""

    type: Literal["text", "json_object", "json_schema"] = Field(description="Form of the answer.")
    json_schema: NamedSchema | None = Field(None, description="The schema of type `json_schema`.")


class StructuredOutputs(Body):
    """The same in vLLM's form."""

    choice: Choices | None = Field(None, description="The answer is one of these.")
    json_: str | Json | bool | None = Field(None, alias="json", description="A JSON schema, or its text.")


class GenerationBody(Body):
    """The fields of both endpoints. Unknown fields are ignored."""

    model: str = Field(description="Name of a soft prompt, or of the base (`base` always means it).", max_length=512)
    n: int = Field(1, ge=1, le=MOST_CHOICES, description="Answers per text; answer i samples with `seed` + i.")
    temperature: float = Field(
        1.0, ge=0, le=_LARGEST, description="0 is greedy; above it, sample with this temperature."
    )
    top_p: float = Field(
        1.0, gt=0, le=1, description="Sample from the likeliest tokens whose probabilities sum to this."
    )
    top_k: int = Field(0, ge=-1, description="Sample from the K likeliest tokens; 0 or -1 is off.")
    min_p: float = Field(
        0.0, ge=0, le=1, description="Sample from tokens at least this many times as likely as the likeliest."
    )
    repetition_penalty: float = Field(
        1.0,
        ge=1 / _LARGEST,
        le=_LARGEST,
        description="Above 1, tokens of the text and of the answer so far become less likely.",
    )
    presence_penalty: float = Field(
        0.0, ge=-2, le=2, description="Subtracted from the logit of each token that the answer already has."
    )
    frequency_penalty: float = Field(
        0.0, ge=-2, le=2, description="Subtracted once for each time that the answer has the token."
    )
    logit_bias: Biases = Field((), description="Token ids, each with a number to add to its logit.")
    seed: int | None = Field(None, ge=-(2**63), lt=2**63,
                             description="Seed of the sampling; default: a random one.")  # fmt: skip
    stop: Stops = Field([], description="End before any of these strings.")
    stop_token_ids: list[TokenId] = Field([], max_length=_MOST_STOP_IDS, description="End at any of these tokens too.")
    min_tokens: int = Field(
        0, ge=0, description="Tokens before which neither an end of text nor a stop string ends the answer."
    )
    ignore_eos: bool = Field(False, description="Continue after the base's end-of-text token.")
    priority: int = Field(0, gt=-PRIORITIES, lt=PRIORITIES,
                          description="Lower is served first; below 0 for admin keys only.")  # fmt: skip
    stream: bool = Field(False, description="Send the answer as server-sent events while it is generated.")
    stream_options: StreamOptions | None = Field(None, description="Only with `stream`.")
    response_format: ResponseFormat | None = Field(None, description="Require JSON: of a schema, or any object.")
    structured_outputs: StructuredOutputs | None = Field(
        None, description="The same in vLLM's form: `choice` or `json`."
    )
    guided_choice: Choices | None = Field(None, description="vLLM's older form of `structured_outputs.choice`.")
    guided_json: str | Json | bool | None = Field(None, description="vLLM's older form of `structured_outputs.json`.")
    cache_salt: str | None = Field(None, min_length=1, max_length=_LONGEST_SALT, description="vLLM's: only your "
                                   "requests with the same salt reuse each other's cached texts.")  # fmt: skip
    user: str | None = Field(
        None, description="The end user: an alias with several targets keeps to one of them for each user."
    )


_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_COMPLETION_EXAMPLE: JsonDict = {
    "model": "quotes",
    "prompt": "There are two nice things that should matter to you:",
    "max_tokens": 100,
    "temperature": 0,
    "repetition_penalty": 1.5,
}
NumTops = Annotated[
    Annotated[int, Field(ge=0, le=20)] | None,
    BeforeValidator(lambda value: None if value is False else value),  # as chat has it
]
Prompt = Annotated[
    Any,  # checked in one pass by `tokenise`: pydantic would try each of four types on a million ids
    WithJsonSchema(
        {"anyOf": [{"type": "string"},
                   {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": MOST_TEXTS},
                   _IDS,
                   {"type": "array", "items": _IDS, "minItems": 1, "maxItems": MOST_TEXTS}]}
    ),
]  # fmt: skip


class CompletionBody(GenerationBody):
    """A text to continue. `suffix` is refused."""

    model_config = ConfigDict(json_schema_extra={"examples": [_COMPLETION_EXAMPLE]})

    prompt: Prompt = Field(description="Text or token ids, or a list of either. Text is read as it is, after BOS if "
                                       "the base has one.")  # fmt: skip
    max_tokens: int = Field(16, ge=0, description="Maximum number of tokens to generate; 0 only with `echo`.")
    best_of: int | None = Field(None, ge=1, le=MOST_CHOICES, description="Must equal `n`.")
    echo: bool = Field(False, description="Put the prompt before each answer; with `logprobs` also those of "
                                         "its tokens, the first of which has none on the bare base.")  # fmt: skip
    logprobs: NumTops = Field(
        None, description="Number of likeliest tokens to report beside each generated one; false for none."
    )
    add_special_tokens: bool = Field(True, description="Whether to put the base's BOS before a text.")


_CHAT_EXAMPLE: JsonDict = {
    "model": "coach",
    "messages": [{"role": "user", "content": "I want you to act as a motivational coach."}],
    "max_completion_tokens": 50,
    "temperature": 0.7,
}
_MOST_MESSAGES = 10_000
_MOST_CALLS = 128


def _switch(value: Any) -> Any:  # Any: checked afterwards
    return bool(value) if type(value) is int and value in (0, 1) else value


Switch = Annotated[bool, BeforeValidator(_switch)]
"""JSON's true or false; some clients write 1 and 0."""


class Part(Body):
    """One part of a message."""

    type: str = Field(description="Only `text`.")
    text: str | None = Field(None, description="The text.")


class Message(Body):
    """One turn of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"] = Field(description="Author of the turn.")
    content: str | list[Part] = Field("", description="The text; several parts are joined by line breaks. Null or "
                                                      "left out only beside `tool_calls`.")  # fmt: skip
    name: str | None = Field(None, description="For chat templates that write it.")
    tool_calls: list[Json] = Field([], max_length=_MOST_CALLS, description="Calls that the assistant made, where the "
                                                                           "chat template writes them.")  # fmt: skip
    tool_call_id: str | None = Field(None, max_length=256, description="Which of them a `tool` message answers.")

    @model_validator(mode="after")
    def _has_content(self) -> Message:
        if "content" not in self.model_fields_set and not self.tool_calls:
            raise ValueError("content is missing; give it, or tool_calls")
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"tool_calls are the assistant's, and the role is {self.role!r}; leave them out")
        return self


class ChatBody(GenerationBody):
    """A conversation to continue, in the form that the prompt was trained on. Tools, audio and images are refused."""

    model_config = ConfigDict(json_schema_extra={"examples": [_CHAT_EXAMPLE]})

    messages: list[Message] = Field(min_length=1, max_length=_MOST_MESSAGES, description="The conversation so far; a "
                                    "prompt not trained on chat reads the last user message only.")  # fmt: skip
    max_completion_tokens: int | None = Field(None, ge=1, description="Tokens to generate at most; default: as many as "
                                                                      "the base has positions left.")  # fmt: skip
    max_tokens: int | None = Field(None, ge=1, description="The older name of `max_completion_tokens`.")
    logprobs: Switch = Field(False, description="Report each token's log-probability.")
    top_logprobs: int | None = Field(None, ge=0, le=20, description="Likeliest tokens reported beside each; with "
                                                                    "`logprobs` only.")  # fmt: skip


_log = logging.getLogger(__name__)
_TOOLS = "the base is no tool-calling model; describe the tool in a message, or ask for JSON with response_format"
_GUIDES = "an answer can be guided by a choice or a JSON schema; use structured_outputs or response_format"
_FORM = "a prompt's own form says how its input is written; use /v1/completions to write it yourself"
_SPEECH = "answers are text"
_MISSING = "this server does not have it; leave it out"

_REFUSED: Mapping[str, str] = {
    "tools": _TOOLS, "tool_choice": _TOOLS, "functions": _TOOLS, "function_call": _TOOLS,
    "parallel_tool_calls": _TOOLS, "web_search_options": _TOOLS, "tool_calls": _TOOLS, "tool_call_id": _TOOLS,
    "audio": _SPEECH, "modalities": _SPEECH,
    "guided_regex": _GUIDES, "guided_grammar": _GUIDES, "regex": _GUIDES, "grammar": _GUIDES,
    "structural_tag": _GUIDES, "json_object": _GUIDES,
    "chat_template": _FORM, "continue_final_message": _FORM, "documents": _FORM,
    "suffix": "a text is continued or answered, and nothing is filled in; leave it out",
    "prediction": _MISSING, "use_beam_search": _MISSING, "prompt_logprobs": _MISSING, "prompt_embeds": _MISSING,
    "truncate_prompt_tokens": _MISSING, "allowed_token_ids": _MISSING, "bad_words": _MISSING,
    "logits_processors": _MISSING,
}  # fmt: skip
_HARMLESS: Mapping[str, tuple[object, ...]] = {  # values of them that ask for nothing
    "tool_choice": ("none", "auto"), "function_call": ("none", "auto"), "modalities": (["text"],),
    "parallel_tool_calls": (True,),
}  # fmt: skip
_TOOLS_OF = {
    "tool_choice": ("tools", "parallel_tool_calls"),
    "function_call": ("functions",),
}  # "none": they are unused


def check_supported(extra: Mapping[str, Any] | None) -> None:  # Any: a client's JSON
    """Raises ApiError 400 for a field that would have to change the answer."""
    unused = {tool for choice, tools in _TOOLS_OF.items() if (extra or {}).get(choice) == "none" for tool in tools}
    for name, value in (extra or {}).items():
        if name in unused:
            continue
        is_off = value is None or value is False or value in ("", 0, [], {})
        if name in _REFUSED and not is_off and value not in _HARMLESS.get(name, ()):
            raise ApiError(400, f"{name} is not supported: {_REFUSED[name]}", "unsupported_parameter", name)
    if extra:
        _log.debug("fields ignored: %s", ", ".join(map(ascii, extra)))

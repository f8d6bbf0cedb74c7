"""The body of /v1/completions, and what it asks for."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict, Field, WithJsonSchema
from pydantic.config import JsonDict

from softprompt.server.inference.fields import MOST_CHOICES, GenerationBody
from softprompt.server.inference.texts import MOST_TEXTS

_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_EXAMPLE: JsonDict = {
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
    Any,  # checked in one pass by `texts`: pydantic would try each of four types on a million ids
    WithJsonSchema(
        {"anyOf": [{"type": "string"},
                   {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": MOST_TEXTS},
                   _IDS,
                   {"type": "array", "items": _IDS, "minItems": 1, "maxItems": MOST_TEXTS}]}
    ),
]  # fmt: skip


class CompletionBody(GenerationBody):
    """A text to continue. `suffix` is refused."""

    model_config = ConfigDict(json_schema_extra={"examples": [_EXAMPLE]})

    prompt: Prompt = Field(description="Text or token ids, or a list of either. Text is read as it stands: BOS, where "
                                       "the base has one, and the text.")  # fmt: skip
    max_tokens: int = Field(16, ge=0, description="Tokens to generate at most; 0 only with `echo`.")
    best_of: int | None = Field(None, ge=1, le=MOST_CHOICES, description="Only the same as `n`.")
    echo: bool = Field(False, description="Put the prompt before each answer; with `logprobs` also those of "
                                         "its tokens, the first of which has none on the bare base.")  # fmt: skip
    logprobs: NumTops = Field(None, description="Likeliest tokens reported beside each chosen one; false is none.")
    add_special_tokens: bool = Field(True, description="Whether the base's BOS goes before a text.")

"""The body of /v1/chat/completions."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field
from pydantic.config import JsonDict

from softprompt.server.inference.fields import Body, GenerationBody

_EXAMPLE: JsonDict = {
    "model": "coach",
    "messages": [{"role": "user", "content": "I want you to act as a motivational coach."}],
    "max_completion_tokens": 50,
    "temperature": 0.7,
}
_MOST_MESSAGES = 10_000


class Part(Body):
    """A piece of a message."""

    type: str = Field(description="Only `text`.")
    text: str | None = Field(None, description="The words.")


class Message(Body):
    """One turn of the conversation."""

    role: Literal["system", "developer", "user", "assistant"] = Field(description="Who speaks.")
    content: str | list[Part] = Field(description="The words; several parts are joined by line breaks.")
    name: str | None = Field(None, description="For chat templates that write it.")


class ChatBody(GenerationBody):
    """A conversation to continue, in the form that the prompt was trained on. Tools, audio and images are refused."""

    model_config = ConfigDict(json_schema_extra={"examples": [_EXAMPLE]})

    messages: list[Message] = Field(min_length=1, max_length=_MOST_MESSAGES, description="The conversation so far; a "
                                    "prompt not trained on chat reads the last user message only.")  # fmt: skip
    max_completion_tokens: int | None = Field(None, ge=1, description="Tokens to generate at most; default: as many as "
                                                                      "the base has positions left.")  # fmt: skip
    max_tokens: int | None = Field(None, ge=1, description="The older name of `max_completion_tokens`.")
    logprobs: bool = Field(False, description="Report each token's log-probability.")
    top_logprobs: int | None = Field(None, ge=0, le=20, description="Likeliest tokens reported beside each; with "
                                                                    "`logprobs` only.")  # fmt: skip

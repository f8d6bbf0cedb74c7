"""The body of /v1/chat/completions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, model_validator
from pydantic.config import JsonDict

from softprompt.server.inference.fields import Body, GenerationBody, Json

_EXAMPLE: JsonDict = {
    "model": "coach",
    "messages": [{"role": "user", "content": "I want you to act as a motivational coach."}],
    "max_completion_tokens": 50,
    "temperature": 0.7,
}
_MOST_MESSAGES = 10_000
_MOST_CALLS = 128


def _switch(value: Any) -> Any:  # Any: checked behind
    return bool(value) if type(value) is int and value in (0, 1) else value


Switch = Annotated[bool, BeforeValidator(_switch)]
"""JSON's true or false; some clients write 1 and 0."""


class Part(Body):
    """A piece of a message."""

    type: str = Field(description="Only `text`.")
    text: str | None = Field(None, description="The words.")


class Message(Body):
    """One turn of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"] = Field(description="Who speaks.")
    content: str | list[Part] = Field("", description="The words; several parts are joined by line breaks. Null or "
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

    model_config = ConfigDict(json_schema_extra={"examples": [_EXAMPLE]})

    messages: list[Message] = Field(min_length=1, max_length=_MOST_MESSAGES, description="The conversation so far; a "
                                    "prompt not trained on chat reads the last user message only.")  # fmt: skip
    max_completion_tokens: int | None = Field(None, ge=1, description="Tokens to generate at most; default: as many as "
                                                                      "the base has positions left.")  # fmt: skip
    max_tokens: int | None = Field(None, ge=1, description="The older name of `max_completion_tokens`.")
    logprobs: Switch = Field(False, description="Report each token's log-probability.")
    top_logprobs: int | None = Field(None, ge=0, le=20, description="Likeliest tokens reported beside each; with "
                                                                    "`logprobs` only.")  # fmt: skip

"""The answers' bodies, for the API's description: they are written as plain JSON by `shape`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.config import JsonDict

_USAGE: JsonDict = {
    "prompt_tokens": 12,
    "completion_tokens": 2,
    "total_tokens": 14,
    "prompt_tokens_details": {"cached_tokens": 0, "virtual_tokens": 20},
    "completion_tokens_details": {
        "reasoning_tokens": 0,
        "audio_tokens": 0,
        "accepted_prediction_tokens": 0,
        "rejected_prediction_tokens": 0,
    },
}
_COMPLETION: JsonDict = {
    "id": "cmpl-0a1b", "object": "text_completion", "created": 1789000000, "model": "quotes",
    "system_fingerprint": "fp_5b1c0d2e3f4a6978",
    "choices": [{"text": " love and", "index": 0, "logprobs": None, "finish_reason": "length", "stop_reason": None}],
    "usage": _USAGE,
}  # fmt: skip
_CHAT: JsonDict = {
    "id": "chatcmpl-0a1b", "object": "chat.completion", "created": 1789000000, "model": "coach",
    "system_fingerprint": "fp_5b1c0d2e3f4a6978",
    "choices": [{"message": {"role": "assistant", "content": " Believe in yourself.", "refusal": None}, "index": 0,
                 "logprobs": None, "finish_reason": "stop", "stop_reason": None}],
    "usage": _USAGE,
}  # fmt: skip


class PromptTokensDetails(BaseModel):
    """What was read beside the text."""

    cached_tokens: int = Field(description="Of the texts, taken from the prefix cache; counted in `prompt_tokens`.")
    virtual_tokens: int = Field(description="Of the soft prompt; counted in no total.")


class CompletionTokensDetails(BaseModel):
    """What OpenAI counts apart: none of it is made here."""

    reasoning_tokens: int
    audio_tokens: int
    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class Usage(BaseModel):
    """Tokens of one call."""

    prompt_tokens: int = Field(description="Of the texts, BOS included; without virtual tokens.")
    completion_tokens: int = Field(description="Of the answers, the tokens that ended them included.")
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class ChoiceEnd(BaseModel):
    """What every choice has."""

    index: int
    finish_reason: Literal["stop", "length"]
    stop_reason: str | int | None = Field(None, description="The stop string or token id of the request that ended it.")


class CompletionLogProbs(BaseModel):
    """Parallel lists, one item per token; nats."""

    tokens: list[str]
    token_logprobs: list[float | None] = Field(
        description="With `echo`, null for a text's first token on the bare base."
    )
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int] = Field(description="Characters of `text` before each token.")


class CompletionChoice(ChoiceEnd):
    """One answer to one text: answer i to text t has the index t * n + i."""

    text: str
    logprobs: CompletionLogProbs | None = None


class Completion(BaseModel):
    """Answers of /v1/completions; with `stream`, events of the same form."""

    model_config = ConfigDict(json_schema_extra={"examples": [_COMPLETION]})

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str = Field(description="Hash of the base and the soft prompt.")
    choices: list[CompletionChoice]
    usage: Usage


class AssistantMessage(BaseModel):
    """The assistant's turn."""

    role: Literal["assistant"]
    content: str
    refusal: None = None


class ChatChoice(ChoiceEnd):
    """One answer."""

    message: AssistantMessage
    logprobs: dict[str, Any] | None = Field(None, description="`content`: one object per token, as OpenAI has it.")


class ChatCompletion(BaseModel):
    """Answers of /v1/chat/completions; a stream's events are `chat.completion.chunk`, with `delta` for `message`."""

    model_config = ConfigDict(json_schema_extra={"examples": [_CHAT]})

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str = Field(description="Hash of the base and the soft prompt.")
    choices: list[ChatChoice]
    usage: Usage

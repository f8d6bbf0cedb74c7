"""The bodies of answers: completions, for the API's description (`format` writes them as plain JSON), and models."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.config import JsonDict

from softprompt.base import Base
from softprompt.server.prompts.capabilities import (
    Capability,
    capabilities,
    label_names,
    placement_of,
    pooling_of,
    task_of,
)
from softprompt.server.prompts.model import Model
from softprompt.types import BaseKind, Placement, Pooling, Task

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
    """Details of `prompt_tokens`."""

    cached_tokens: int = Field(description="Tokens of the texts found in the prefix cache; counted in `prompt_tokens`.")
    virtual_tokens: int = Field(description="Virtual tokens of the soft prompt; counted in no total.")


class CompletionTokensDetails(BaseModel):
    """Counts of OpenAI's API; all are 0 here."""

    reasoning_tokens: int
    audio_tokens: int
    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class Usage(BaseModel):
    """Tokens of one request."""

    prompt_tokens: int = Field(description="Tokens of the texts, with BOS and without virtual tokens.")
    completion_tokens: int = Field(description="Tokens of the answers, including those that ended them.")
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class ChoiceEnd(BaseModel):
    """The fields of every choice."""

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
    """Response of /v1/completions; with `stream`, events of the same form."""

    model_config = ConfigDict(json_schema_extra={"examples": [_COMPLETION]})

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str = Field(description="Hash of base and soft prompt; ends in _int8 under --weights int8.")
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
    """Response of /v1/chat/completions; a stream's events are `chat.completion.chunk`, with `delta` for `message`."""

    model_config = ConfigDict(json_schema_extra={"examples": [_CHAT]})

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str = Field(description="Hash of base and soft prompt; ends in _int8 under --weights int8.")
    choices: list[ChatChoice]
    usage: Usage


_OPERATORS = "softprompt"
_MODEL: JsonDict = {
    "id": "quotes", "object": "model", "created": 1789000000, "owned_by": "softprompt", "root": "embedded",
    "max_model_len": 2048, "source": "library", "job": None, "shared": True, "pinned": False,
    "task": "generate", "capabilities": ["generate"], "labels": [], "placement": None, "pooling": None,
    "base_kind": "causal", "num_virtual_tokens": 20, "content_hash": "0f3a…", "parent": None,
    "form": {"kind": "plain", "template": None, "completion": None, "labels": []},
    "base_name": "embedded", "base_fingerprint": "5b1c…",
}  # fmt: skip


class ModelObject(BaseModel):
    """The base, or one soft prompt on it."""

    model_config = ConfigDict(json_schema_extra={"examples": [_MODEL]}, protected_namespaces=())

    id: str = Field(description="Its name in requests.")
    object: Literal["model"] = "model"
    created: int = Field(description="When it was first served (seconds since 1970).")
    owned_by: str = Field(description="The API key's id, or `softprompt` for the operator's.")
    root: str = Field(description="The base's id.")
    max_model_len: int = Field(description="Positions: virtual tokens, text and answer together.")
    source: str = Field(description="base, library, upload, folder, hub, job or checkpoint.")
    job: str | None = Field(None, description="The fine-tuning job that made it.")
    shared: bool = Field(description="Whether every client may use it.")
    pinned: bool = Field(description="Whether its KV prefix stays in memory.")
    base_kind: BaseKind = Field(description="causal, encoder or seq2seq (an encoder-decoder).")
    task: Task = Field(description="What it was trained for: generate, cloze, classify, tag, answer or embed.")
    capabilities: list[Capability] = Field(
        description="What the server does with it: generate (/v1/completions), classify (/v1/classify), embed "
        "(/v1/embeddings)."
    )
    labels: list[str] = Field(description="Labels that it chooses from, in the order of `probs`; empty without.")
    placement: Placement | None = Field(
        None, description="Of its virtual tokens in an encoder's input: `front`, or `after-cls`; null elsewhere."
    )
    pooling: Pooling | None = Field(
        None, description="Hidden state that is classified or embedded: cls, mean, last or peft; null without one."
    )
    num_virtual_tokens: int = Field(description="Length of the soft prompt; 0 for the base.")
    content_hash: str | None = Field(None, description="sha256 of the soft prompt's numbers.")
    parent: str | None = Field(
        None, description="Content hash of the prompt from which the training of this one started."
    )
    form: dict[str, Any] | None = Field(None, description="The form of its training inputs.")
    base_name: str | None = Field(None, description="The base that it was trained on.")
    base_fingerprint: str | None = Field(None, description="Hash of what that base computes; null if unknown.")


class ModelList(BaseModel):
    """All models that the client may use, the base first."""

    object: Literal["list"] = "list"
    data: list[ModelObject]


def describe(model: Model, base: Base, root: str) -> ModelObject:
    """The public description of a model; `root` is the base's id."""
    prompt = model.prompt
    record = None if prompt is None else prompt.record
    return ModelObject(
        id=model.id,
        created=int(model.created),
        owned_by=model.owner or _OPERATORS,
        root=root,
        max_model_len=base.max_length,
        source=model.source,
        job=model.job,
        shared=model.is_shared,
        pinned=model.is_pinned,
        base_kind=base.kind,
        task=task_of(model, base),
        capabilities=list(capabilities(model, base)),
        labels=list(label_names(model)),
        placement=placement_of(model, base),
        pooling=pooling_of(model, base),
        num_virtual_tokens=0 if prompt is None else prompt.num_virtual_tokens,
        content_hash=None if prompt is None else prompt.content_hash,
        parent=None if record is None else record.parent,
        form=None if record is None else record.form.to_json(),
        base_name=base.name if record is None else record.base_name,
        base_fingerprint=base.fingerprint if record is None else record.base_fingerprint,
    )

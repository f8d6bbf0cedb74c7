"""/v1/models: what the client may ask for, with what is known of each."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.config import JsonDict

from softprompt.base import Base
from softprompt.server.prompts.model import Model

_OPERATORS = "softprompt"
_EXAMPLE: JsonDict = {
    "id": "quotes", "object": "model", "created": 1789000000, "owned_by": "softprompt", "root": "embedded",
    "max_model_len": 2048, "source": "library", "job": None, "shared": True, "pinned": False,
    "num_virtual_tokens": 20, "content_hash": "0f3a…", "parent": None,
    "form": {"kind": "plain", "template": None, "completion": None, "labels": []},
    "base_name": "embedded", "base_fingerprint": "5b1c…",
}  # fmt: skip


class ModelObject(BaseModel):
    """The base, or one soft prompt on it."""

    model_config = ConfigDict(json_schema_extra={"examples": [_EXAMPLE]}, protected_namespaces=())

    id: str = Field(description="The name to ask for it by.")
    object: Literal["model"] = "model"
    created: int = Field(description="When it was first served (seconds since 1970).")
    owned_by: str = Field(description="The API key's id, or `softprompt` for the operator's.")
    root: str = Field(description="The base's id.")
    max_model_len: int = Field(description="Positions: virtual tokens, text and answer together.")
    source: str = Field(description="base, library, upload, folder, hub, job or checkpoint.")
    job: str | None = Field(None, description="The fine-tuning job that made it.")
    shared: bool = Field(description="Whether every client may use it.")
    pinned: bool = Field(description="Whether its keys and values stay in memory.")
    num_virtual_tokens: int = Field(description="Length of the soft prompt; 0 for the base.")
    content_hash: str | None = Field(None, description="sha256 of the soft prompt's numbers.")
    parent: str | None = Field(None, description="Content hash of the prompt that this one was trained on from.")
    form: dict[str, Any] | None = Field(None, description="How its training inputs were written.")
    base_name: str | None = Field(None, description="The base that it was trained on.")
    base_fingerprint: str | None = Field(
        None, description="What that base computes, as a hash; null where it is unknown."
    )


class ModelList(BaseModel):
    """All models that the client may use, the base first."""

    object: Literal["list"] = "list"
    data: list[ModelObject]


def describe(model: Model, base: Base, root: str) -> ModelObject:
    """What is told of a model; `root` is the base's id."""
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
        num_virtual_tokens=0 if prompt is None else prompt.num_virtual_tokens,
        content_hash=None if prompt is None else prompt.content_hash,
        parent=None if record is None else record.parent,
        form=None if record is None else record.form.to_json(),
        base_name=base.name if record is None else record.base_name,
        base_fingerprint=base.fingerprint if record is None else record.base_fingerprint,
    )

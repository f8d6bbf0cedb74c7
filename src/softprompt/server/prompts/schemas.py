"""The JSON bodies of the routes for prompts and aliases."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from softprompt.base import Base
from softprompt.server.prompts.capabilities import Capability, capabilities
from softprompt.server.prompts.model import Alias, Model
from softprompt.storage.library import NAME
from softprompt.types import BaseKind, Placement, Pooling, Task, finite

Name = Annotated[
    str,
    Field(
        pattern=f"^{NAME.pattern}$",
        description="1 to 64 letters, digits, '.', '_' or '-', the first one a letter or digit.",
        examples=["coach-v3"],
    ),
]


class Body(BaseModel):
    """A request's body; unknown fields are refused."""

    model_config = ConfigDict(extra="forbid")


class FormOut(BaseModel):
    """How the prompt's training inputs were written."""

    kind: Literal["plain", "template", "chat"] = Field(examples=["template"])
    template: str | None = Field(examples=["Review: {text}"])
    completion: str | None = Field(examples=[" {label}"])
    labels: list[str] = Field(examples=[["bad", "good"]])
    task: Task = Field("generate", description="What it was trained for.")
    placement: Placement = Field("front", description="Of its virtual tokens in an encoder's input.")
    pooling: Pooling | None = Field(None, description="Hidden state that is classified or embedded.")
    label_words: list[list[str]] = Field([], description="Of task cloze: the words that stand for each label.")
    has_decoder_prompt: bool = Field(False, description="Whether half of its vectors are the decoder's.")


class RecordOut(BaseModel):
    """Where a prompt comes from. PEFT's own adapters state none of it."""

    base_name: str | None = Field(description="The base that it was trained on.", examples=["bigscience/bloomz-560m"])
    base_fingerprint: str | None = Field(description="What that base computes. Null: only the width was compared.")
    form: FormOut
    parent: str | None = Field(description="Content hash of the prompt that it was trained on from.")
    run: dict[str, Any] | None = Field(None, description="Its training: plan, data hash, curve. Not in lists.")


class PromptOut(BaseModel):
    """One soft prompt that is served."""

    id: str = Field(description="Its name, for a request's `model`.", examples=["coach-v3"])
    object: Literal["prompt"] = "prompt"
    created: int = Field(description="Seconds since 1970.", examples=[1_760_000_000])
    source: str = Field(description="library, upload, folder, hub, job or checkpoint.", examples=["upload"])
    job: str | None = Field(description="The fine-tuning job that made it.", examples=["ftjob-abc123"])
    is_own: bool = Field(description="Whether it is yours.")
    shared: bool = Field(description="Whether everybody may use it.")
    pinned: bool = Field(description="Whether its keys and values stay in the engine's memory.")
    aliases: list[str] = Field(description="Other names that you may use for it.", examples=[["coach"]])
    base_kind: BaseKind = Field(description="Of the base that is served.", examples=["causal"])
    capabilities: list[Capability] = Field(description="What the server does with it.", examples=[["generate"]])
    num_virtual_tokens: int = Field(examples=[20])
    hidden_size: int = Field(examples=[1024])
    num_bytes: int = Field(description="Of its vectors and its head (float32).", examples=[81_920])
    content_hash: str = Field(description="sha256 of its vectors and its head.", examples=["0f3a…"])
    record: RecordOut


class ProblemOut(BaseModel):
    """A prompt that cannot be served."""

    name: str = Field(examples=["coach-v4"])
    problem: str = Field(examples=["coach-v4 is [4, 64]; the input embeddings of base are [250880, 1024]"])


class TargetOut(BaseModel):
    model: str = Field(examples=["coach-v3"])
    share: float = Field(description="Of the alias's requests, all shares being 1 together.", examples=[0.9])


class AliasOut(BaseModel):
    """Another name."""

    id: str = Field(examples=["coach"])
    object: Literal["alias"] = "alias"
    created: int = Field(description="Seconds since 1970, when it was last changed.", examples=[1_760_000_000])
    is_own: bool = Field(description="Whether it is yours.")
    shared: bool = Field(description="Whether everybody may use it.")
    targets: list[TargetOut] | None = Field(description="Null where the alias is not yours.")


class PromptList(BaseModel):
    """A page of prompts, by name."""

    object: Literal["list"] = "list"
    data: list[PromptOut]
    has_more: bool = Field(description="Whether another page follows; ask for it with `after`, the last `id`.")
    aliases: list[AliasOut]
    problems: list[ProblemOut] | None = Field(None, description="What cannot be served and why; for admins.")


class AliasList(BaseModel):
    object: Literal["list"] = "list"
    data: list[AliasOut]


class Deleted(BaseModel):
    id: str = Field(examples=["coach-v3"])
    object: str = Field(examples=["model"])
    deleted: Literal[True] = True


class PromptIn(Body):
    """An adapter to serve: a folder on the server's machine (for admins), or a repository on the Hugging Face Hub."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {"name": "coach-v3", "folder": "/srv/adapters/coach-v3"},
                {"name": "coach-v3", "hub": "me/coach-v3", "revision": "main", "overwrite": True},
            ]
        },
    )

    name: Name
    folder: Annotated[str, Field(min_length=1, max_length=4096)] | None = Field(
        None, description="An adapter folder; its content is copied. For admins."
    )
    hub: Annotated[str, Field(min_length=3, max_length=200)] | None = Field(None, description="owner/name")
    revision: Annotated[str, Field(min_length=1, max_length=200)] | None = Field(
        None, description="Branch, tag or commit on the Hub."
    )
    overwrite: bool = Field(False, description="Replace your prompt of that name.")
    shared: bool = Field(False, description="Everybody may use it; for admins.")

    @model_validator(mode="after")
    def _one_of_two(self) -> PromptIn:
        if (self.folder is None) == (self.hub is None):
            raise ValueError("give folder or hub, one of the two")
        return self


class FromUpload(Body):
    """A form's fields beside its files."""

    name: Name
    overwrite: bool = False
    shared: bool = False


class Change(Body):
    """What to change of a prompt; what is left out stays."""

    name: Name | None = Field(None, description="A new name.")
    pinned: bool | None = Field(None, description="Keep its keys and values in the engine's memory.")
    shared: bool | None = Field(None, description="Let everybody use it; for admins.")


class TargetIn(Body):
    model: Annotated[str, Field(min_length=1, max_length=256, examples=["coach-v3"])]
    share: Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False, examples=[0.9])] = 1.0


class AliasIn(Body):
    """One model, or several that share the requests."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {"model": "coach-v3"},
                {"targets": [{"model": "coach-v3", "share": 0.9}, {"model": "coach-v4", "share": 0.1}]},
            ]
        },
    )

    model: Annotated[str, Field(min_length=1, max_length=256)] | None = Field(None, description="Its prompt.")
    targets: Annotated[list[TargetIn], Field(min_length=1, max_length=100)] | None = Field(
        None, description="Several, each with its share of the requests; shares count beside one another."
    )
    shared: bool = Field(False, description="Everybody may use it; for admins.")

    @model_validator(mode="after")
    def _one_of_two(self) -> AliasIn:
        if (self.model is None) == (self.targets is None):
            raise ValueError("give model or targets, one of the two")
        names = [each.model for each in self.targets or ()]
        if len(set(names)) < len(names):
            raise ValueError("targets names a model twice")
        return self


def prompt_out(model: Model, base: Base, owner: str, aliases: list[str], *, with_run: bool) -> PromptOut:
    """A prompt as this owner may see it."""
    prompt = model.prompt
    assert prompt is not None
    record = prompt.record
    return PromptOut(
        id=model.id,
        created=int(model.created),
        source=model.source,
        job=model.job,
        is_own=model.owner == owner,
        shared=model.is_shared,
        pinned=model.is_pinned,
        aliases=aliases,
        base_kind=base.kind,
        capabilities=list(capabilities(model, base)),
        num_virtual_tokens=prompt.num_virtual_tokens,
        hidden_size=prompt.hidden_size,
        num_bytes=prompt.num_bytes,
        content_hash=prompt.content_hash,
        record=RecordOut(
            base_name=record.base_name,
            base_fingerprint=record.base_fingerprint,
            form=FormOut(**record.form.to_json()),
            parent=record.parent,
            run=finite(record.run) if with_run else None,
        ),
    )


def alias_out(alias: Alias, owner: str) -> AliasOut:
    """An alias as this owner may see it."""
    whole = sum(each.share for each in alias.targets)
    targets = [TargetOut(model=each.model, share=each.share / whole) for each in alias.targets]
    return AliasOut(
        id=alias.name,
        created=int(alias.created),
        is_own=alias.owner == owner,
        shared=alias.is_shared,
        targets=targets if alias.owner == owner else None,
    )

"""What a model can do on a base, and the refusal, by name, of what it cannot."""

from __future__ import annotations

from typing import Literal

from softprompt.base import Base
from softprompt.evaluation.predict import label_names as names_of_labels
from softprompt.server.errors import ApiError
from softprompt.server.prompts.model import Model
from softprompt.types import InputForm, Placement, Pooling, Task

Capability = Literal["generate", "classify", "embed"]

_ENDPOINTS = {"generate": "/v1/completions", "classify": "/v1/classify", "embed": "/v1/embeddings"}
_TRAINED_FOR: dict[Task, str] = {
    "generate": "generates text", "cloze": "classifies texts", "classify": "classifies texts", "tag": "tags words",
    "answer": "finds answers in a context", "embed": "embeds texts",
}  # fmt: skip
_VERBS: dict[Capability, str] = {"generate": "generate text", "classify": "classify texts", "embed": "embed texts"}


def task_of(model: Model, base: Base) -> Task:
    """What its prompt was trained for; the bare base generates, or embeds where it is an encoder."""
    if model.prompt is not None:
        return model.prompt.record.form.task
    return "embed" if base.kind == "encoder" else "generate"


def capabilities(model: Model, base: Base) -> tuple[Capability, ...]:
    """What the server does with a model. A prompt that tags or finds answers is for `softprompt predict`."""
    task, found = task_of(model, base), list[Capability]()
    if task == "generate" and base.kind != "encoder":
        found.append("generate")
    form = InputForm() if model.prompt is None else model.prompt.record.form
    has_labels = bool(form.labels) and form.kind == "template"
    if task in ("cloze", "classify") or (task == "generate" and has_labels and base.kind != "encoder"):
        found.append("classify")
    if task == "embed":
        found.append("embed")
    return tuple(found)


def label_names(model: Model) -> tuple[str, ...]:
    """The labels that it chooses from, as its training rows had them."""
    if model.prompt is None:
        return ()
    form = model.prompt.record.form
    return names_of_labels(form) if form.task == "generate" else form.labels


def placement_of(model: Model, base: Base) -> Placement | None:
    """Where the virtual tokens stand in an encoder's input."""
    return model.prompt.record.form.placement if model.prompt is not None and base.kind == "encoder" else None


def pooling_of(model: Model, base: Base) -> Pooling | None:
    """The state that is classified or embedded."""
    if model.prompt is not None:
        return model.prompt.record.form.pooling
    return "mean" if base.kind == "encoder" else None


def endpoints_note(base: Base) -> str:
    """What the server answers on a base, for people."""
    own = "/v1/embeddings" if base.kind == "encoder" else "/v1/completions and /v1/chat/completions"
    more = " or /v1/embeddings" if base.kind == "causal" else ""
    return f"the base answers {own}; prompts that are trained for it /v1/classify{more} too"


def require(model: Model, base: Base, capability: Capability) -> None:
    """Raises ApiError 400 where the model cannot do it, naming what it does."""
    known = capabilities(model, base)
    if capability in known:
        return
    where = " or ".join(_ENDPOINTS[each] for each in known)
    hint = f"; use {where}" if where else "; use softprompt predict" if model.prompt is not None else ""
    raise ApiError(400, f"{_what(model, base)} and does not {_VERBS[capability]}{hint}", "unsupported_model", "model")


def _what(model: Model, base: Base) -> str:
    if model.prompt is not None:
        return f"the prompt {model.id!r} {_TRAINED_FOR[task_of(model, base)]}"
    does = "embeds texts" if base.kind == "encoder" else "generates text"
    kind = {"causal": "a causal language model", "encoder": "an encoder", "seq2seq": "an encoder-decoder"}[base.kind]
    return f"the bare base {model.id!r} is {kind}: it {does}"

"""What the rows are trained for, and the settings that follow from it where none are given (`config.TASK_DEFAULTS`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from softprompt.config import TrainConfig
from softprompt.data import task_of
from softprompt.data.rows import MAX_LABELS
from softprompt.errors import ConfigError, shortened
from softprompt.types import ExampleSet

_FITTED_TASKS = ("classify", "tag")
_SHOWN_WITH_HEAD = ("loss", "head_init", "head_learning_rate")
_LOSS = {"labels": "loss among the labels", "tokens": "loss on every token"}
_REPARAMETERISATION = {"none": "plain vectors", "residual-mlp": "residual MLP", "low-rank": "low-rank update"}


def resolved_for(config: TrainConfig, data: ExampleSet) -> TrainConfig:
    """The settings with the defaults of the rows' task.

    Raises ConfigError for a loss among labels where the rows have none, and for a fitted head where none can be.
    """
    task = task_of(data.form)
    if config.head_init == "fit" and data.form.task not in _FITTED_TASKS:
        raise ConfigError(
            f"head_init is 'fit', but task {task!r} has no head that labels of single states could be fitted with; "
            "leave it out",
            param="head_init",
        )
    if data.form.task != "generate" and config.loss == "labels":
        raise ConfigError(f"loss is 'labels', but task {task!r} has a loss of its own; leave it out", param="loss")
    resolved = config.resolved(task)
    if resolved.loss == "labels" and not any(example.branches for example in data.examples):
        raise ConfigError(
            f"loss is 'labels', but {data.report.source} has {_no_labels(data)}; use loss 'tokens'", param="loss"
        )
    return resolved


def task_line(given: TrainConfig, data: ExampleSet) -> str:
    """The task, why it is that, and the settings that follow from it."""
    task = task_of(data.form)
    follows = dict(given.defaults_by_task(task))
    if data.form.task != "generate":
        shown = {name: value for name, value in follows.items() if name not in _SHOWN_WITH_HEAD}
        follows = {**_of_head(given.resolved(task), data), **shown}
    words = ", ".join(_words(follows)) or "every setting that goes by task is given"
    return f"task: {task} ({_reason(data)}): {words}"


def _reason(data: ExampleSet) -> str:
    rows = f"{len(data):,} row{'' if len(data) == 1 else 's'}"
    reasons = {
        "text": f"{rows} of plain text",
        "labels": f"{len(data.form.labels)} of them in {rows}",
        "chat": f"{rows} of messages",
        "answers": f"{rows} with a completion each, which are no set of labels",
        "answer": f"{rows} with a question and a context",
        "embed": f"{rows} of texts that belong together",
    }
    of_labels = f"{len(data.form.labels)} {'tag' if data.form.task == 'tag' else 'label'}s, {rows}"
    return reasons.get(task_of(data.form), of_labels)


def _of_head(given: TrainConfig, data: ExampleSet) -> dict[str, str]:
    """How the states are read, and what by."""
    form = data.form
    states = {"cls": "[CLS]", "mean": "the mean over the text", "last": "the last token", "peft": "what PEFT reads"}
    first = "fitted " if given.head_init == "fit" else ""
    read = "" if form.pooling is None else f" over {states[form.pooling]}"
    loss = {"cloze": "loss among the label words at the mask", "embed": f"loss among the rows of a step{read}"}
    is_behind = form.placement == "after-cls" and any(example.num_before for example in data.examples[:1])
    return {
        "head": loss.get(form.task) or f"a {first}head{read} at rate {given.head_learning_rate:g}",
        "placement": "virtual tokens behind [CLS]" if is_behind else "virtual tokens in front",
    }


def _words(settings: Mapping[str, Any]) -> list[str]:
    known: dict[str, Callable[[Any], str]] = {
        **dict.fromkeys(("head", "placement"), str),
        "loss": lambda value: _LOSS[value],
        "relative_learning_rate": lambda value: f"rate {value:g} x RMS",
        "reparameterisation": lambda value: _REPARAMETERISATION[value],
        "epochs": lambda value: f"{value} epoch{'' if value == 1 else 's'}",
        "averaging": lambda value: f"the mean over the last {value:.0%} of the steps" if value else "",
    }
    words = [known[name](value) if name in known else f"{name} {value}" for name, value in settings.items()]
    return [word for word in words if word]


def _no_labels(data: ExampleSet) -> str:
    if not data.form.labels:
        return (
            f"no labels (a template's completion, or a label column, with 2 to {MAX_LABELS} different texts that "
            "occur twice each on average)"
        )
    return f"labels that all have the same tokens, {', '.join(map(shortened, data.form.labels[:3]))}"

"""The model card: what an adapter is, how to use it and how good it is, for people and for the Hub.

It states the prompt's form with its template and labels, and numbers and settings from a fixed list. It contains no row
of the training data, and no path but that of a local base, which is left out of what is pushed to the Hub.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from softprompt.prompt import Judgement, SoftPrompt
from softprompt.storage.card_usage import fields_of, usage
from softprompt.types import HEADED_TASKS, PromptRecord, Task

_SETTINGS = (
    "task", "loss", "virtual_tokens", "init", "reparameterisation", "epochs", "max_steps", "steps", "kept_step",
    "averaging", "interrupted", "seconds", "batch_rows", "batch_tokens", "learning_rate", "relative_learning_rate",
    "schedule", "warmup_steps", "weight_decay", "max_grad_norm", "eos", "seed", "rows", "data_hash", "dtype",
    "softprompt", "torch", "transformers",
)  # fmt: skip
PLAIN_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+_-]{0,79}")  # a setting or a version; no path, no sentence
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")
_PIPELINES: Mapping[Task, str] = {  # the Hub's names
    "generate": "text-generation",
    "cloze": "text-classification",
    "classify": "text-classification",
    "tag": "token-classification",
    "answer": "question-answering",
    "embed": "feature-extraction",
}
_WRITTEN: tuple[Task, ...] = ("generate", "cloze", "classify")  # tasks whose template writes one text


def model_card(prompt: SoftPrompt) -> str:
    """README.md of an adapter folder, in Markdown with the Hub's front matter."""
    parts = (_front_matter, _description, _form, _figures, usage, _training)
    return "\n".join(text for part in parts if (text := part(prompt)))


def _front_matter(prompt: SoftPrompt) -> str:
    base = _base(prompt)
    known = base is not None and is_hub_id(base)
    lines = ["---", "library_name: peft", f"pipeline_tag: {_pipeline(prompt.record)}"]
    lines += [f"base_model: {json.dumps(base)}"] if known else []
    lines += ["tags:", "- prompt-tuning", "- soft-prompt", "- softprompt"]
    lines += [f"- {json.dumps(f'base_model:adapter:{base}')}"] if known else []
    return "\n".join([*lines, "---", ""])


def _pipeline(record: PromptRecord) -> str:
    is_seq2seq = record.form.task == "generate" and record.base_kind == "seq2seq"
    return "text2text-generation" if is_seq2seq else _PIPELINES[record.form.task]


def _description(prompt: SoftPrompt) -> str:
    form = prompt.record.form
    base = "an unknown base" if prompt.record.base_name is None else f"`{_one_line(prompt.record.base_name)}`"
    lines = [
        f"# Soft prompt for {base}",
        "",
        f"{prompt.num_virtual_tokens} trained vectors of width {prompt.hidden_size} that are put {_where(prompt)} of "
        f"every input. The base, {base}, is unchanged and is not part of this folder.",
        "",
        f"- Content: sha256 `{prompt.content_hash}` over shape and values",
        f"- Input form: {form.kind}",
    ]
    if form.task != "generate":
        lines.append(f"- Task: {form.task}; placement {form.placement}")
    if form.pooling is not None:
        lines.append(f"- Pooling: {form.pooling}")
    if prompt.head:
        shapes = ", ".join(f"`{name}` {list(weight.shape)}" for name, weight in prompt.head.items())
        lines.append(f"- Head, trained beside the vectors: {shapes}")
    if prompt.record.base_fingerprint is not None:
        lines.append(f"- Base fingerprint: `{_one_line(prompt.record.base_fingerprint)}`")
    if prompt.record.parent is not None:
        lines.append(f"- Trained on from: `{_one_line(prompt.record.parent)}`")
    return "\n".join([*lines, ""])


def _where(prompt: SoftPrompt) -> str:
    """Before which tokens the vectors stand."""
    if prompt.num_decoder_tokens:
        count = prompt.num_decoder_tokens
        return f"before the tokens that the encoder reads, and {count} more before those that the decoder writes,"
    is_behind = prompt.record.form.placement == "after-cls"
    return "behind the first token ([CLS])" if is_behind else "before the tokens"


def _form(prompt: SoftPrompt) -> str:
    """What is read of an input, and the labels that answers are chosen from."""
    form = prompt.record.form
    lines = []
    if form.template is not None and form.task in _WRITTEN:
        lines += ["## Template", "", "An input is put into", "", _fenced(form.template), ""]
    elif form.template is not None:
        lines += ["## Input", "", "These columns are read:", "", _fenced(", ".join(fields_of(form))), ""]
    if form.labels:
        joined = "and the answer is" if form.template is not None and form.task in _WRITTEN else "The answer is"
        each = " for each word" if form.task == "tag" else ""
        lines += [f"{joined} one of{each}", "", _fenced(json.dumps(form.labels, ensure_ascii=False)), ""]
    if form.label_words:
        words = dict(zip(form.labels, form.label_words, strict=False))
        lines += ["for which these words stand at the mask, by average:", ""]
        lines += [_fenced(json.dumps(words, ensure_ascii=False)), ""]
    return "\n".join(lines)


def _figures(prompt: SoftPrompt) -> str:
    """Figures on held-out rows, where training measured them."""
    run = prompt.record.run
    judgement = Judgement.from_json(run.get("held_out"))
    judged = [] if judgement is None else [f"{judgement.text}.", ""]
    lines = [
        *judged,
        *_accuracy_lines(run.get("held_out"), prompt.record.form.task),
        *_loss_lines(run.get("validation_losses"), run.get("kept_step"), prompt.record.form.task),
    ]
    return "\n".join(["## On rows that it was not trained on", "", *lines, ""]) if lines else ""


def _accuracy_lines(found: Any, task: Task) -> list[str]:  # Any: a record is JSON, and may be a stranger's
    try:
        low, high = found["interval"]
        shares = [found["accuracy"], low, high, found["majority"], found["bare_base"]]
        right, low, high, majority, bare = (f"{100 * float(share):.0f}" for share in shares)
        num_rows = int(found["rows"])
    except (TypeError, KeyError, ValueError):
        return []
    of_base = "" if task in HEADED_TASKS else f", the bare base with the same template {bare}"
    return [
        f"- Right {right} times in 100 ({low} to {high}), of {num_rows:,} rows; always answering the commonest label "
        f"would be {majority}{of_base}"
    ]


def _loss_lines(losses: Any, kept_step: Any, task: Task) -> list[str]:  # Any: as above
    unit = {"generate": "text token", "answer": "answer", "embed": "text"}.get(task, "label")
    try:
        return [f"- Validation loss: {dict(losses)[kept_step]:.3f} nats per {unit}"]
    except (TypeError, KeyError, ValueError):
        return []


def _training(prompt: SoftPrompt) -> str:
    settings: dict[str, str] = {}
    for name, text in _plain_settings({key: value for key, value in prompt.record.run.items() if key != "held_out"}):
        settings.setdefault(name, text)
    if not settings:
        return "## Training\n\nNothing is recorded.\n"
    lines = [f"- {name.replace('_', ' ')}: {settings[name]}" for name in _SETTINGS if name in settings]
    return "\n".join(["## Training", "", *lines, ""])


def _plain_settings(run: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Listed settings anywhere in the run, outer ones first: numbers, booleans and single plain words."""
    for name, value in sorted(run.items(), key=lambda item: isinstance(item[1], Mapping)):
        if isinstance(value, Mapping):
            yield from _plain_settings(value)
        elif name in _SETTINGS and isinstance(value, bool | int | float):
            yield name, f"{value:.6g}" if isinstance(value, float) else str(value)
        elif name in _SETTINGS and isinstance(value, str) and PLAIN_WORD.fullmatch(value):
            yield name, value


def _base(prompt: SoftPrompt) -> str | None:
    """The Hub id or folder that the base was loaded from, else its name."""
    return prompt.record.base_source or prompt.record.base_name


def _fenced(text: str) -> str:
    """Text in a block of code whose fence is longer than any in the text."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def _one_line(text: str) -> str:
    return " ".join(text.replace("`", "'").split())


def is_hub_id(name: str) -> bool:
    """Whether a base's name can be one of the Hub's, and is no path of this machine."""
    return _HUB_ID.fullmatch(name) is not None

"""What a base can do with rows: their task, with placement, pooling and label words; `auto` is resolved here.

cloze      a template with one mask, and label words
classify   a text (or its template) and its label
tag        words and one tag for each: lists, as token classification sets have them
answer     a question, a context, and the span of the context that answers it, as SQuAD has them
embed      an anchor and a positive text, and negative ones if there are any

Of a form's template the fields are what is read, of its completion what is learned. Only cloze and classify write text
with them; the other tasks read the fields one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from softprompt.base import Base
from softprompt.config import TrainConfig
from softprompt.data.rows import Rows, in_label_order, parse_template, with_labels
from softprompt.errors import ConfigError, shortened
from softprompt.types import InputForm, Placement, Pooling, Task, is_number

MASKS = ("[MASK]", "<mask>")  # in a template, besides the tokenizer's own: the mask of whatever base reads it
_OF_TEXT: tuple[Task, ...] = ("generate", "cloze", "classify")  # tasks whose templates write text
_POOLED: tuple[Task, ...] = ("classify", "embed")
_SHOWN = 8  # labels


def with_task(rows: Rows, base: Base, config: TrainConfig) -> Rows:
    """The rows with the form of their task on this base: task, placement, pooling, label words; `auto` resolved.

    Rows that have been resolved stay as they are, under the same settings. Raises ConfigError where the base or the
    rows cannot do what the settings ask for, naming why; DataError for a row that cannot be read.
    """
    task = _task(rows, base, config)
    check_task(base, task, config)
    if task == "generate":
        form = _generated(rows, config)
        return rows if form == rows.form else replace(rows, form=form)
    resolved = with_labels(_in_form_of(rows, task))
    form = replace(resolved.form, placement=_placement(base, config), pooling=_pooling(base, task, config))
    if task in ("cloze", "classify", "tag") and len(form.labels) < 2:
        found = f"only {shortened(form.labels[0])}" if form.labels else "none"
        raise ConfigError(f"task {task!r} needs two labels or more, and {rows.source} has {found}; give other rows")
    if task == "cloze":
        check_mask(base, form)
        form = replace(form, label_words=_label_words(form, config, rows.source))
    return rows if form == rows.form else replace(resolved, form=form)


def _task(rows: Rows, base: Base, config: TrainConfig) -> Task:
    """What the settings ask for; else what the rows were read for; else what the base does with such rows."""
    if config.task != "auto":
        return config.task
    form = rows.form
    if form.task != "generate" or base.kind != "encoder":
        return form.task
    if form.kind != "template":
        what = "messages" if form.kind == "chat" else "plain text"
        raise ConfigError(
            f"base {base.name!r} is an encoder, which writes no text, and {rows.source} is read as {what}; name a "
            "label column (for classify or tag), or columns as docs/tasks.md has them for answer and embed"
        )
    assert form.template is not None
    if mask_in(base, form.template) is not None:
        return "cloze"
    if not with_labels(rows).form.labels:
        raise ConfigError(
            f"base {base.name!r} is an encoder, which writes no text, and the completions of {rows.source} are no set "
            "of labels; give a label column, or task classify to have a class for each completion"
        )
    return "classify"


def check_task(base: Base, task: Task, config: TrainConfig) -> None:
    """Raises ConfigError for a task that the base cannot do, and for a setting that does not suit the two."""
    _check_base(base, task)
    _check_settings(base, task, config)


def _check_base(base: Base, task: Task) -> None:
    """Raises ConfigError for a task that the base cannot do."""
    if base.kind == "seq2seq" and task != "generate":
        raise ConfigError(
            f"task {task!r} needs an encoder or a causal base, and {base.name!r} is an encoder-decoder; use task "
            "generate, with the label as the text to write",
            param="task",
        )
    if base.kind == "encoder" and task == "generate":
        raise ConfigError(
            f"base {base.name!r} is an encoder, which writes no text; use task classify, tag, answer or embed, or "
            "cloze with a mask in the template",
            param="task",
        )
    if task == "cloze" and base.mask_id is None:
        lacks = "has no masked-LM head or no mask token" if base.kind == "encoder" else "is causal"
        other = "classify" if base.kind == "encoder" else "generate, whose loss can be among the labels,"
        raise ConfigError(
            f"task 'cloze' needs an encoder with its masked-LM head, and base {base.name!r} {lacks}; use task {other} "
            "instead",
            param="task",
        )


def _check_settings(base: Base, task: Task, config: TrainConfig) -> None:
    """Raises ConfigError for a setting that does not suit the task or the base."""
    if config.decoder_prompt and base.kind != "seq2seq":
        raise ConfigError(
            f"decoder_prompt is for encoder-decoders, and base {base.name!r} has no decoder of its own; leave it out",
            param="decoder_prompt",
        )
    if config.pooling != "auto" and task not in _POOLED:
        raise ConfigError(
            f"pooling is {config.pooling!r}, but task {task!r} reads its own columns; leave it out", param="pooling"
        )
    if config.label_words and task != "cloze":
        raise ConfigError(
            f"label_words {shortened(config.label_words[0])} are for task cloze, and the task is {task!r}; "
            "leave them out",
            param="label_words",
        )
    if config.placement == "after-cls" and (base.kind != "encoder" or not base.bos_ids):
        why = "is no encoder" if base.kind != "encoder" else "has a tokenizer that puts no token in front of a text"
        raise ConfigError(
            f"placement is 'after-cls', but base {base.name!r} {why}; use placement front", param="placement"
        )


def _generated(rows: Rows, config: TrainConfig) -> InputForm:
    if rows.form.task not in _OF_TEXT:
        raise ConfigError(
            f"task 'generate' needs text, and {rows.source} is read for task {rows.form.task!r}; name its columns with "
            "a template and a completion"
        )
    return replace(rows.form, task="generate", has_decoder_prompt=config.decoder_prompt)


def _in_form_of(rows: Rows, task: Task) -> Rows:
    """The rows with templates for this task. Raises ConfigError where they have not what it needs."""
    form = rows.form
    if task not in _OF_TEXT:
        if form.task != task:
            raise ConfigError(_not_read_for(rows, task))
        return rows
    if form.task not in _OF_TEXT or form.template is None or form.completion is None:
        raise ConfigError(_not_read_for(rows, task))
    if form.task != "generate":
        return replace(rows, form=replace(form, task=task))
    template, completion, notes = form.template, form.completion.strip(), rows.notes
    if rows.label_columns is not None and task == "classify":
        text, label = rows.label_columns
        template, completion = f"{{{text}}}", f"{{{label}}}"
        notes = tuple(note for note in notes if not note.startswith(f"labels in column {label!r}"))
        notes = (f"texts in column {text!r}, labels in column {label!r}", *notes)
    labels = in_label_order(label.strip() for label in form.labels)
    form = replace(form, task=task, template=template, completion=completion, labels=labels)
    return replace(rows, form=form, notes=notes)


def _not_read_for(rows: Rows, task: Task) -> str:
    needs = {
        "cloze": "a template with a mask and a label column",
        "classify": "a text and a label column",
        "tag": "a column with lists of words and one with their tags (text_column and label_column)",
        "answer": "question, context and answers (template '{question}\\n{context}', completion '{answers}')",
        "embed": "columns with an anchor and a positive text (template '{anchor}', completion '{positive}')",
    }[task]
    form = rows.form
    found = {"plain": "plain text", "chat": "messages"}.get(form.kind, f"template {form.template!r}")
    return f"task {task!r} needs {needs}, and {rows.source} is read as {found}"


def _placement(base: Base, config: TrainConfig) -> Placement:
    if config.placement != "auto":
        return config.placement
    is_behind = base.kind == "encoder" and bool(base.bos_ids) and config.pooling != "peft"
    return "after-cls" if is_behind else "front"


def _pooling(base: Base, task: Task, config: TrainConfig) -> Pooling | None:
    """[CLS] of an encoder with a masked-LM head, the last token of a causal base, which sees all, and else the mean.

    An encoder without that head is most often one of sentences, which are means over their tokens; so are embeddings.

    Raises ConfigError where the state to read is none of the base's.
    """
    if task not in _POOLED:
        return None
    if config.pooling == "cls" and (base.kind != "encoder" or not base.bos_ids):
        raise ConfigError(
            f"pooling is 'cls', but base {base.name!r} has no [CLS] that sees the text; use pooling mean or last",
            param="pooling",
        )
    if config.pooling == "peft" and _placement(base, config) != "front":
        raise ConfigError("pooling 'peft' reads the first virtual token, as PEFT puts it; use placement front with it",
                          param="pooling")  # fmt: skip
    if config.pooling != "auto":
        return config.pooling
    if base.kind == "causal":
        return "last"
    return "cls" if task == "classify" and base.bos_ids and base.mask_id is not None else "mean"


def mask_in(base: Base, template: str) -> tuple[int, int, int] | None:
    """Where a template's first mask stands: the number of its literal text, and first and end character in that.

    A mask written in a field is only text.
    """
    own = base.tokenizer.mask_token
    marks = (*((str(own),) if own else ()), *MASKS)
    for number, token in enumerate(parse_template(template)):
        found = [(token.text.find(mark), mark) for mark in marks if not token.is_field and mark in token.text]
        if found:
            first, mark = min(found)
            return number, first, first + len(mark)
    return None


def check_mask(base: Base, form: InputForm) -> None:
    """Raises ConfigError where a template has not exactly one mask."""
    assert form.template is not None
    parts = _around_mask(base, form.template)
    if parts is None:
        example = f"{form.template.strip()} {base.tokenizer.mask_token or MASKS[0]}."
        raise ConfigError(
            f"task 'cloze' needs a mask in the template, and {form.template!r} has none; write {example!r}, say",
            param="template",
        )
    if mask_in(base, parts[1]) is not None:
        raise ConfigError(f"template {form.template!r} has several masks; task 'cloze' reads one", param="template")


def split_at_mask(base: Base, template: str) -> tuple[str, str]:
    """The parts of a template before and behind its mask, templates themselves."""
    parts = _around_mask(base, template)
    assert parts is not None, "the form of a cloze has a mask"
    return parts


def _around_mask(base: Base, template: str) -> tuple[str, str] | None:
    found = mask_in(base, template)
    if found is None:
        return None
    number, first, end = found
    tokens = [f"{{{token.text}}}" if token.is_field else _as_literal(token.text) for token in parse_template(template)]
    literal = parse_template(template)[number].text
    before = [*tokens[:number], _as_literal(literal[:first])]
    return "".join(before), "".join([_as_literal(literal[end:]), *tokens[number + 1 :]])


def _as_literal(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


def _label_words(form: InputForm, config: TrainConfig, source: str) -> tuple[tuple[str, ...], ...]:
    """The words of each label, those given or its own text. Raises ConfigError; the objective checks their tokens."""
    if not config.label_words and form.label_words and len(form.label_words) == len(form.labels):
        return form.label_words
    given = _given_words(form.labels, config.label_words)
    numbers = [label for label in form.labels if label not in given and is_number(label)]
    if numbers:
        raise ConfigError(
            f"the labels of {source} are numbers ({_listed(form.labels)}), which a mask seldom stands for; give each "
            f"of them words, {numbers[0]}=terrible say (--label-words, once for each label)",
            param="label_words",
        )
    return tuple(given.get(label, (label,)) for label in form.labels)


def _given_words(labels: Sequence[str], settings: Sequence[str]) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for setting in settings:
        fitting = [label for label in labels if setting.startswith(f"{label}=")]
        label = max(fitting, key=len, default=None)
        if label is None:
            raise ConfigError(
                f"label_words {shortened(setting)} names none of the labels {_listed(labels)}; write LABEL=WORD",
                param="label_words",
            )
        words = tuple(word.strip() for word in setting[len(label) + 1 :].split(",") if word.strip())
        if not words:
            raise ConfigError(f"label_words {shortened(setting)} has no word behind the =; write LABEL=WORD",
                              param="label_words")  # fmt: skip
        found[label] = (*found.get(label, ()), *words)
    return found


def _listed(labels: Sequence[str]) -> str:
    more = f" and {len(labels) - _SHOWN:,} more" if len(labels) > _SHOWN else ""
    return ", ".join(map(shortened, labels[:_SHOWN])) + more

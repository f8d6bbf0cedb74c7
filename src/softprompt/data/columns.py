"""The form of a data set and the columns that it reads: decided once, from the settings and the columns.

Without settings, unambiguous column names decide: chat messages, a prompt with its completion, words with their tags,
a question with its context and answers, an anchor with a positive text, a text with its label, one text. Notes report a
guess and unused columns before training starts. What the base can do with the form is decided later
(`softprompt.data.tasks`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from softprompt.config import DataConfig, TaskChoice
from softprompt.data.cells import is_missing, is_whole_number
from softprompt.data.messages import check_row_keys, reserved_columns
from softprompt.data.rows import (
    Rows,
    form_columns,
    known_columns,
    labels_of,
    require_fields,
    template_fields,
)
from softprompt.errors import ConfigError, DataError
from softprompt.settings import typed_text
from softprompt.types import InputForm, Task, is_number

_USUAL_TEXT = "text"
_USUAL_MESSAGES = "messages"
_USUAL_PAIR = ("prompt", "completion")
_USUAL_LABELS = ("label_text", "label")  # words before numbers, where a set has both
_USUAL_WORDS = ("tokens", "words")
_USUAL_TAGS = ("ner_tags", "tags", "labels")
_USUAL_ANSWER = ("question", "context")
_USUAL_ANSWERS = ("answers", "answer")
_USUAL_EMBED = (("anchor", "positive"), ("query", "positive"), ("sentence1", "sentence2"))
_EXAMPLES_OF: Mapping[Task, str] = {  # of settings that name a task's columns
    "tag": "text_column for the words and label_column for the tags",
    "answer": "template '{question}\\n{context}' and completion '{answers}'",
    "embed": "template '{anchor}' and completion '{positive}'",
}
_NAMED = 8  # columns, or labels, that a note lists at most


class SourceTable(NamedTuple):
    """A source as read: no form yet."""

    source: str
    columns: tuple[str, ...]
    records: Sequence[Mapping[str, Any]]  # Any: cells are checked when they are asked for
    notes: tuple[str, ...] = ()  # for the user: how it was read


class FormChoice(NamedTuple):
    """The form and what it reads."""

    form: InputForm
    column: str | None  # text or messages column
    needed: tuple[str, ...]  # every column that the form reads
    note: str | None = None  # what was guessed
    label_columns: tuple[str, str] | None = None  # text and label, where the template was made of them


def rows_of(table: SourceTable, config: DataConfig, form: InputForm | None = None, task: TaskChoice = "auto") -> Rows:
    """All rows of a table in the form of the settings, else in `form`, with only the needed columns.

    `task` is what they are wanted for, where that is known before the base is.

    Raises DataError for an empty table, a missing column, a column that would select what is learned, and where several
    columns are possible.
    """
    if not table.records:
        raise DataError(f"{table.source} has no rows; there is nothing to learn from")
    choice = choose_form(table, config, form, task)
    is_suspect = reserved_columns(table.columns, choice.needed)
    for number, record in enumerate(table.records if is_suspect else (), start=1):
        check_row_keys(record, choice.needed, choice.form.kind, f"row {number:,} of {table.source}")
    return Rows(
        records=tuple({name: record.get(name) for name in choice.needed} for record in table.records),
        indices=tuple(range(len(table.records))),
        source=table.source,
        form=choice.form,
        column=choice.column,
        label_columns=choice.label_columns,
        notes=tuple(note for note in (*table.notes, choice.note, _unused(table, choice)) if note is not None),
    )


def choose_form(
    table: SourceTable, config: DataConfig, form: InputForm | None = None, task: TaskChoice = "auto"
) -> FormChoice:
    """By the settings; else by `form`; else by the names of the columns."""
    if config.template is not None:
        completion = config.completion if config.completion is not None else f" {{{config.label_column}}}"
        return _template_choice(table, typed_text(config.template), typed_text(completion), _as_parts(task))
    if config.messages_column is not None:
        return _column_choice(table, config.messages_column, "chat")
    if config.label_column is not None:
        return _labelled_choice(table, config.text_column, config.label_column, task)
    if config.text_column is not None:
        return _column_choice(table, config.text_column, "plain")
    return _guessed(table, task) if form is None else _fitted(table, form)


def _as_parts(task: TaskChoice) -> Task:
    """The task of a form that has no template of text: its fields are read one by one."""
    return task if task in ("tag", "answer", "embed") else "generate"


def _fitted(table: SourceTable, form: InputForm) -> FormChoice:
    """The form of other rows, or of a trained prompt, applied to this table."""
    if form.template is not None and form.completion is not None:
        choice = _template_choice(table, form.template, form.completion, form.task)
        return choice._replace(form=replace(form, labels=()))
    if form.kind == "chat" and _USUAL_MESSAGES in table.columns:
        return _column_choice(table, _USUAL_MESSAGES, "chat")
    return _column_choice(table, _text_column(table), "plain")


def _guessed(table: SourceTable, task: TaskChoice) -> FormChoice:
    if task in _PARTS_CHOICES:
        return _wanted_parts(table, task)
    if _USUAL_MESSAGES in table.columns:
        return _column_choice(table, _USUAL_MESSAGES, "chat")
    if all(name in table.columns for name in _USUAL_PAIR):
        choice = _template_choice(table, "{prompt}", "{completion}")
        return choice._replace(note="learning to continue column 'prompt' with column 'completion'")
    parts = None if task != "auto" or _USUAL_TEXT in table.columns else _parts_choice(table)
    if parts is not None:
        return parts
    label = next((name for usual in _USUAL_LABELS for name in table.columns if name.strip().lower() == usual), None)
    if label is not None and _labels(table, label):
        try:
            return _label_choice(table, None, label)
        except DataError:  # no text, or several columns of it
            pass
    return _column_choice(table, _text_column(table), "plain")


def _wanted_parts(table: SourceTable, task: Any) -> FormChoice:  # Any: a key of _PARTS_CHOICES
    found = _PARTS_CHOICES[task](table)
    if found is None:
        raise DataError(
            f"{table.source}: task {task!r} needs columns that {_listed(table.columns)} are not; name them with "
            f"{_EXAMPLES_OF[task]}"
        )
    return found


def _parts_choice(table: SourceTable) -> FormChoice | None:
    """The form of a set whose columns are called as those of its task are, and hold what those hold."""
    return next((found for choose in _PARTS_CHOICES.values() if (found := choose(table)) is not None), None)


def _tag_choice(table: SourceTable, words: str | None = None, tags: str | None = None) -> FormChoice | None:
    lists = [name for name in table.columns if _holds_lists(table, name)]
    usual_words = [name for name in _USUAL_WORDS if name in lists] or [n for n in lists if _holds_words(table, n)]
    words = words or next(iter(usual_words), None)
    usual_tags = [name for name in _USUAL_TAGS if name in lists and name != words] or [n for n in lists if n != words]
    tags = tags or next(iter(usual_tags), None)
    if words is None or tags is None:
        return None
    choice = _template_choice(table, f"{{{words}}}", f"{{{tags}}}", "tag")
    return choice._replace(note=f"words in column {words!r}, their tags in column {tags!r}")


def _answer_choice(table: SourceTable) -> FormChoice | None:
    answers = next((name for name in _USUAL_ANSWERS if name in table.columns), None)
    if answers is None or not all(name in table.columns for name in _USUAL_ANSWER):
        return None
    start = "{answer_start}" if "answer_start" in table.columns else ""
    return _template_choice(table, "{question}\n{context}", f"{{{answers}}}{start}", "answer")


def _embed_choice(table: SourceTable) -> FormChoice | None:
    for anchor, positive in _USUAL_EMBED:
        if anchor in table.columns and positive in table.columns:
            negatives = [name for name in table.columns if name.startswith("negative") and _holds_text(table, name)]
            if positive == "sentence2" and set(table.columns) - {anchor, positive, *negatives}:
                return None  # a score or a label says what the pair means
            others = "".join(f"{{{name}}}" for name in (positive, *negatives))
            return _template_choice(table, f"{{{anchor}}}", others, "embed")
    return None


_PARTS_CHOICES: Mapping[str, Callable[[SourceTable], FormChoice | None]] = {
    "tag": _tag_choice, "answer": _answer_choice, "embed": _embed_choice,
}  # fmt: skip


def _labelled_choice(table: SourceTable, text: str | None, label: str, task: TaskChoice) -> FormChoice:
    """Words and tags where the named columns hold lists, or are wanted for that; else a text and its label."""
    _require_column(table, label)
    if task == "tag" or (task == "auto" and _holds_lists(table, label)):
        found = _tag_choice(table, text, label)
        return found if found is not None else _wanted_parts(table, "tag")
    return _label_choice(table, text, label)


def _label_choice(table: SourceTable, text: str | None, label: str) -> FormChoice:
    """A template of the text and, after the name of the label's column, its label."""
    for name in (label,) if text is None else (text, label):
        _require_column(table, name)
    text = text if text is not None else _text_column(table, but=label)
    for name in (text, label):
        if {"{", "}"} & set(name):
            raise DataError(f"{table.source}: column {name!r} has braces in its name; rename it, or give a template")
    cue = label.replace("_", " ").strip().capitalize()
    template, completion = f"{{{text}}}\n{cue}:", f" {{{label}}}"
    choice = _template_choice(table, template, completion)
    labels = _labels(table, label)
    which = f" ({len(labels)}: {_listed(labels)})" if labels else ", which are too many to choose from"
    shown = (template + completion).replace("\n", "\\n")
    note = (
        f'labels in column {label!r}{which}, learned as "{shown}"; '
        f"--text-column {text} alone trains a language model, and a --template in words of the task may do better"
    )
    return choice._replace(note=note, label_columns=(text, label))


def _template_choice(table: SourceTable, template: str, completion: str, task: Task = "generate") -> FormChoice:
    for text in (template, completion):
        require_fields(text, table.columns, f"{table.source}: ")
    needed = tuple(dict.fromkeys(template_fields(template) + template_fields(completion)))
    if not template_fields(completion):
        raise ConfigError(f"completion {completion!r} has no {{column}} field, so every row would teach the same words")
    form = InputForm(kind="template", template=template, completion=completion, task=task)
    _check_parts(form)
    return FormChoice(form, None, needed)


def _check_parts(form: InputForm) -> None:
    """Raises ConfigError where a task's templates have not the fields that it needs."""
    num_inputs, num_more = {"tag": (1, 0), "answer": (2, 1), "embed": (1, 99)}.get(form.task, (0, 0))
    inputs, completions = form_columns(form)
    if num_inputs and (len(inputs) != num_inputs or len(completions) > num_more + 1):
        raise ConfigError(
            f"task {form.task!r} needs other fields than template {form.template!r} and completion "
            f"{form.completion!r} have; write {_EXAMPLES_OF[form.task]}, with your own column names"
        )


def _column_choice(table: SourceTable, column: str, kind: Any) -> FormChoice:  # Any: a FormKind literal
    _require_column(table, column)
    return FormChoice(InputForm(kind=kind), column, (column,))


def _require_column(table: SourceTable, column: str) -> None:
    if column not in table.columns:
        raise DataError(f"{table.source} has no column {column!r}; {known_columns(column, table.columns)}")


def _text_column(table: SourceTable, but: str | None = None) -> str:
    """The column called `text`, or the only text column; numbers do not count, though in a CSV they are text."""
    names = [name for name in table.columns if name != but]
    usual = [name for name in names if name == _USUAL_TEXT] or [n for n in names if n.strip().lower() == _USUAL_TEXT]
    if usual:
        return usual[0]
    textual = [name for name in names if _holds_text(table, name)]
    wordy = [name for name in textual if not _holds_numbers(table, name)]
    if len(wordy or textual) == 1:
        return (wordy or textual)[0]
    listed = _listed(wordy or textual or names)
    reason = f"{len(wordy or textual)} columns hold text ({listed})" if textual else f"no column holds text ({listed})"
    raise DataError(
        f"{table.source}: {reason}; name one with text_column, beside it label_column for labels, or write a row with "
        "template and completion"
    )


def _holds_lists(table: SourceTable, name: str) -> bool:
    cells = _cells(table, name)
    return bool(cells) and all(isinstance(cell, (list, tuple)) or hasattr(cell, "tolist") for cell in cells)


def _holds_words(table: SourceTable, name: str) -> bool:
    return all(isinstance(item, str) for cell in _cells(table, name) for item in cell)


def _holds_text(table: SourceTable, name: str) -> bool:
    cells = _cells(table, name)
    return bool(cells) and all(isinstance(cell, str) for cell in cells)


def _holds_numbers(table: SourceTable, name: str) -> bool:
    return all(is_number(cell) for cell in _cells(table, name) if cell)


def _labels(table: SourceTable, name: str) -> tuple[str, ...]:
    """The distinct cells, if all are words or whole numbers and few enough to be a closed set."""
    cells = _cells(table, name)
    if not all(isinstance(cell, str) or is_whole_number(cell) for cell in cells):
        return ()
    return labels_of([text for cell in cells if (text := str(cell)).strip()])


def _cells(table: SourceTable, name: str) -> list[Any]:  # Any: as a table's cells are
    return [cell for record in table.records if not is_missing(cell := record.get(name))]


def _unused(table: SourceTable, choice: FormChoice) -> str | None:
    """The columns that training will not see; of those called as labels are, what they hold and how to learn them."""
    names = [name for name in table.columns if name not in choice.needed]
    if not names:
        return None
    note = f"columns not used: {_listed(names)}"
    label = next((name for usual in _USUAL_LABELS for name in names if name.strip().lower() == usual), None)
    labels = () if label is None else _labels(table, label)
    if not labels or choice.form.kind != "plain":
        return note
    return f"{note} (--label-column {label} learns the {len(labels)} labels {_listed(labels)})"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
    return ", ".join(map(repr, names[:_NAMED])) + more

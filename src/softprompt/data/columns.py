"""The form of a data set and the columns that it reads: decided once, from the settings and the columns.

Without settings, unambiguous column names decide: chat messages, a prompt with its completion, a text with its label,
one text. Notes report a guess and unused columns before training starts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from softprompt.config import DataConfig
from softprompt.data.messages import check_row_keys, reserved_columns
from softprompt.data.rows import (
    Rows,
    is_missing,
    is_whole_number,
    known_columns,
    labels_of,
    require_fields,
    template_fields,
)
from softprompt.errors import ConfigError, DataError
from softprompt.settings import typed_text
from softprompt.types import InputForm, is_number

_USUAL_TEXT = "text"
_USUAL_MESSAGES = "messages"
_USUAL_PAIR = ("prompt", "completion")
_USUAL_LABELS = ("label_text", "label")  # words before numbers, where a set has both
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


def rows_of(table: SourceTable, config: DataConfig, form: InputForm | None = None) -> Rows:
    """All rows of a table in the form of the settings, else in `form`, with only the needed columns.

    Raises DataError for an empty table, a missing column, a column that would select what is learned, and where several
    columns are possible.
    """
    if not table.records:
        raise DataError(f"{table.source} has no rows; there is nothing to learn from")
    choice = choose_form(table, config, form)
    is_suspect = reserved_columns(table.columns, choice.needed)
    for number, record in enumerate(table.records if is_suspect else (), start=1):
        check_row_keys(record, choice.needed, choice.form.kind, f"row {number:,} of {table.source}")
    return Rows(
        records=tuple({name: record.get(name) for name in choice.needed} for record in table.records),
        indices=tuple(range(len(table.records))),
        source=table.source,
        form=choice.form,
        column=choice.column,
        notes=tuple(note for note in (*table.notes, choice.note, _unused(table, choice)) if note is not None),
    )


def choose_form(table: SourceTable, config: DataConfig, form: InputForm | None = None) -> FormChoice:
    """By the settings; else by `form`; else by the names of the columns."""
    if config.template is not None and config.completion is not None:
        return _template_choice(table, typed_text(config.template), typed_text(config.completion))
    if config.messages_column is not None:
        return _column_choice(table, config.messages_column, "chat")
    if config.label_column is not None:
        return _label_choice(table, config.text_column, config.label_column)
    if config.text_column is not None:
        return _column_choice(table, config.text_column, "plain")
    return _guessed(table) if form is None else _fitted(table, form)


def _fitted(table: SourceTable, form: InputForm) -> FormChoice:
    """The form of other rows, or of a trained prompt, applied to this table."""
    if form.template is not None and form.completion is not None:
        return _template_choice(table, form.template, form.completion)
    if form.kind == "chat" and _USUAL_MESSAGES in table.columns:
        return _column_choice(table, _USUAL_MESSAGES, "chat")
    return _column_choice(table, _text_column(table), "plain")


def _guessed(table: SourceTable) -> FormChoice:
    if _USUAL_MESSAGES in table.columns:
        return _column_choice(table, _USUAL_MESSAGES, "chat")
    if all(name in table.columns for name in _USUAL_PAIR):
        choice = _template_choice(table, *(f"{{{name}}}" for name in _USUAL_PAIR))
        return choice._replace(note="learning to continue column 'prompt' with column 'completion'")
    label = next((name for usual in _USUAL_LABELS for name in table.columns if name.strip().lower() == usual), None)
    if label is not None and _labels(table, label):
        try:
            return _label_choice(table, None, label)
        except DataError:  # no text, or several columns of it
            pass
    return _column_choice(table, _text_column(table), "plain")


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
    return choice._replace(note=note)


def _template_choice(table: SourceTable, template: str, completion: str) -> FormChoice:
    for text in (template, completion):
        require_fields(text, table.columns, f"{table.source}: ")
    needed = tuple(dict.fromkeys(template_fields(template) + template_fields(completion)))
    if not template_fields(completion):
        raise ConfigError(f"completion {completion!r} has no {{column}} field, so every row would teach the same words")
    return FormChoice(InputForm(kind="template", template=template, completion=completion), None, needed)


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

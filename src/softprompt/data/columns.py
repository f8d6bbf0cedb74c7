"""Which form a data set takes, and from which columns: decided once, from the settings and the columns there are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from softprompt.config import DataConfig
from softprompt.data.messages import check_row_keys, choosing_columns
from softprompt.data.rows import Rows, is_missing
from softprompt.data.template import known_columns, require_fields, template_fields, typed_text
from softprompt.errors import ConfigError, DataError
from softprompt.types import InputForm

_USUAL_TEXT = "text"
_USUAL_MESSAGES = "messages"


class Table(NamedTuple):
    """A source as read: no form yet."""

    source: str
    columns: tuple[str, ...]
    records: Sequence[Mapping[str, Any]]  # Any: cells are checked when they are asked for


class Choice(NamedTuple):
    """The form and what it reads."""

    form: InputForm
    column: str | None  # text or messages column
    needed: tuple[str, ...]  # every column that the form reads


def rows_of(table: Table, config: DataConfig) -> Rows:
    """All rows of a table in the form that the settings ask for, only the needed columns kept.

    Raises DataError for an empty table, a column it does not have or one that would choose what is learned,
    ConfigError for settings that contradict.
    """
    if not table.records:
        raise DataError(f"{table.source} has no rows; there is nothing to learn from")
    choice = choose_form(table, config)
    is_suspect = choosing_columns(table.columns, choice.needed)
    for number, record in enumerate(table.records if is_suspect else (), start=1):
        check_row_keys(record, choice.needed, choice.form.kind, f"row {number:,} of {table.source}")
    return Rows(
        records=tuple({name: record.get(name) for name in choice.needed} for record in table.records),
        indices=tuple(range(len(table.records))),
        source=table.source,
        form=choice.form,
        column=choice.column,
    )


def choose_form(table: Table, config: DataConfig) -> Choice:
    """Plain, template or chat, as asked; else by the column `messages`, the column `text`, or the only one of text."""
    _refuse_contradictions(config)
    if config.template is not None and config.completion is not None:
        return _template_choice(table, typed_text(config.template), typed_text(config.completion))
    if config.messages_column is not None:
        return _column_choice(table, config.messages_column, "chat")
    if config.text_column is not None:
        return _column_choice(table, config.text_column, "plain")
    if _USUAL_MESSAGES in table.columns:
        return _column_choice(table, _USUAL_MESSAGES, "chat")
    return _column_choice(table, _only_text_column(table), "plain")


def _refuse_contradictions(config: DataConfig) -> None:
    if (config.template is None) != (config.completion is None):
        given, lacking = ("template", "completion") if config.completion is None else ("completion", "template")
        raise ConfigError(f"{given} {getattr(config, given)!r} needs a {lacking} too: the two make one example")
    named = {
        "text_column": config.text_column,
        "template": config.template,
        "messages_column": config.messages_column,
    }
    given_names = [name for name, value in named.items() if value is not None]
    if len(given_names) > 1:
        raise ConfigError(f"{' and '.join(given_names)} exclude each other; give one")


def _template_choice(table: Table, template: str, completion: str) -> Choice:
    for text in (template, completion):
        require_fields(text, table.columns, f"{table.source}: ")
    needed = tuple(dict.fromkeys(template_fields(template) + template_fields(completion)))
    if not template_fields(completion):
        raise ConfigError(f"completion {completion!r} has no {{column}} field, so every row would teach the same words")
    return Choice(InputForm(kind="template", template=template, completion=completion), None, needed)


def _column_choice(table: Table, column: str, kind: Any) -> Choice:  # Any: a FormKind literal
    if column not in table.columns:
        raise DataError(f"{table.source} has no column {column!r}; {known_columns(column, table.columns)}")
    return Choice(InputForm(kind=kind), column, (column,))


def _only_text_column(table: Table) -> str:
    if _USUAL_TEXT in table.columns:
        return _USUAL_TEXT
    textual = [name for name in table.columns if _holds_text(table, name)]
    if len(textual) == 1:
        return textual[0]
    listed = ", ".join(map(repr, textual or table.columns))
    reason = f"{len(textual)} columns hold text ({listed})" if textual else f"no column holds text ({listed})"
    raise DataError(f"{table.source}: {reason}; name one with text_column")


def _holds_text(table: Table, name: str) -> bool:
    cells = [cell for record in table.records if not is_missing(cell := record.get(name))]
    return bool(cells) and all(isinstance(cell, str) for cell in cells)

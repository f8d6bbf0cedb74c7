"""Rows that are to be answered: the columns that a prompt reads of them. Labels and completions are not needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from softprompt.base import Base
from softprompt.config import DataConfig
from softprompt.data.cells import is_missing
from softprompt.data.chat import chat_prompt_ids
from softprompt.data.messages import Message, read_messages
from softprompt.data.rows import Rows, known_columns, render_prompt, render_text, template_fields
from softprompt.data.tokens import source_ids
from softprompt.errors import DataError
from softprompt.types import InputForm

TEXT, MESSAGES = "text", "messages"  # columns that need not be named


def input_columns(form: InputForm, columns: Sequence[str], config: DataConfig) -> dict[str, str]:
    """The columns that the form reads, each by the name that the form has for it.

    Raises DataError for one that is missing, and where several are possible.
    """
    if form.kind == "template":
        assert form.template is not None
        return _template_columns(form.template, columns, config)
    usual = MESSAGES if form.kind == "chat" else TEXT
    given = config.messages_column if form.kind == "chat" else None
    column = given or config.text_column or (columns[0] if len(columns) == 1 else usual)
    _require(column, columns, config)
    return {usual: column}


def _template_columns(template: str, columns: Sequence[str], config: DataConfig) -> dict[str, str]:
    names = template_fields(template)
    if config.text_column is not None:
        if len(names) != 1:
            raise DataError(
                f"text_column names one column, but the prompt's template {template!r} has the fields "
                f"{', '.join(map(repr, names))}; rename the columns instead"
            )
        _require(config.text_column, columns, config)
        return {names[0]: config.text_column}
    for name in names:
        if name not in columns:
            hint = "; name the column of its text with text_column" if len(names) == 1 else ""
            raise DataError(
                f"{config.data}: the prompt's template {template!r} asks for {name!r}; "
                f"{known_columns(name, columns)}{hint}"
            )
    return {name: name for name in names}


def _require(column: str, columns: Sequence[str], config: DataConfig) -> None:
    if column not in columns:
        raise DataError(
            f"{config.data} has no column {column!r}; {known_columns(column, columns)}; name one with text_column"
        )


def input_rows(
    form: InputForm, records: Sequence[Mapping[str, Any]], columns: Mapping[str, str], source: str, first: int
) -> Rows:  # Any: cells are checked when they are read
    """Records as rows of the form, of which number `first` is the first one."""
    named = tuple({name: record.get(column) for name, column in columns.items()} for record in records)
    column = None if form.kind == "template" else next(iter(columns))
    return Rows(records=named, indices=tuple(range(first, first + len(named))), source=source, form=form, column=column)


def input_text(rows: Rows, position: int) -> str:
    """The text of a row that is no chat: its template without the completion, or its plain text; "" where it has none.

    Raises DataError, naming the row, for a cell that is not text.
    """
    return render_prompt(rows, position) if rows.form.kind == "template" else render_text(rows, position)


def input_row_ids(base: Base, rows: Rows, position: int) -> tuple[int, ...]:
    """Ids of a row's text or chat, with those around it; none where it is empty. Raises DataError as `input_text` does.

    A chat that ends with the assistant's turn is answered in its place.
    """
    if rows.form.kind == "chat":
        return _chat_ids(base, rows, position)
    text = input_text(rows, position)
    return source_ids(base, text) if text.strip() else ()


def _chat_ids(base: Base, rows: Rows, position: int) -> tuple[int, ...]:
    assert rows.column is not None
    cell, where = rows.records[position].get(rows.column), rows.where(position)
    if is_missing(cell) or cell == "":
        return ()
    if isinstance(cell, str):
        render_text(rows, position)  # refuses half of a surrogate pair
        return chat_prompt_ids(base, [{"role": "user", "content": cell}], where)
    messages: tuple[Message, ...] = read_messages(cell, where, for_training=False)
    asked = messages[:-1] if messages and messages[-1]["role"] == "assistant" else messages
    return chat_prompt_ids(base, asked, where) if asked else ()

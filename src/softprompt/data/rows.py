"""Rows as they were read, before any tokenizer: the fields a form needs, where each row comes from, and its text."""

from __future__ import annotations

import hashlib
import json
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, NamedTuple

from softprompt.compute_share import yield_point
from softprompt.data.messages import Message, is_learned, read_messages
from softprompt.data.template import fill_template, template_fields
from softprompt.errors import DataError, shortened
from softprompt.types import InputForm, brief_repr


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows of one source with the form that turns them into text."""

    __repr__ = brief_repr

    records: tuple[Mapping[str, Any], ...]  # Any: a cell may hold whatever the file held, until it is asked for
    indices: tuple[int, ...]  # zero-based index in the source, one per record
    source: str  # file, folder or Hub id, for messages and for the run's record
    form: InputForm
    column: str | None = None  # the text or messages column; None where the form's template names the columns
    notes: tuple[str, ...] = ()  # what the user should know about how they were read: columns not used, a guess

    def __len__(self) -> int:
        return len(self.records)

    def take(self, positions: Iterable[int]) -> Rows:
        """Some of these rows, by position here (not by source index), in the order given."""
        chosen = list(positions)
        return replace(
            self,
            records=tuple(self.records[position] for position in chosen),
            indices=tuple(self.indices[position] for position in chosen),
        )

    def where(self, position: int) -> str:
        """How a message names a row: counted from 1, a header not counted."""
        return f"row {self.indices[position] + 1:,} of {self.source}"


class Written(NamedTuple):
    """One row as text."""

    text: str = ""  # what is learned: the plain text or the completion
    prompt: str = ""  # kind "template": what stands before the completion
    messages: tuple[Message, ...] = ()  # kind "chat"
    is_empty: bool = False  # nothing to learn: no text, no completion, no learned word of the assistant

    @property
    def key(self) -> str:
        """Equal for rows with identical text."""
        return json.dumps([self.prompt, self.text, self.messages], ensure_ascii=False, sort_keys=True)


def write_row(rows: Rows, position: int) -> Written:
    """A row's text.

    Raises DataError, naming the row, for a cell that is not text, half of a surrogate pair, and messages that are not
    a chat.
    """
    yield_point()
    written = _written(rows, position)
    try:
        (written.key if written.messages else f"{written.prompt}{written.text}").encode()
    except UnicodeEncodeError:
        raise DataError(f"{rows.where(position)} holds half of a surrogate pair, which is no text") from None
    return written


def write_rows(rows: Rows) -> list[Written]:
    """All rows' text, in order. Raises DataError as `write_row` does."""
    return [write_row(rows, position) for position in range(len(rows))]


def rows_hash(rows: Rows) -> str:
    """sha256 (hex) of the rows' text, in order."""
    return written_hash(write_rows(rows))


def written_hash(written: Sequence[Written]) -> str:
    """sha256 (hex) of rows already written as text, in order."""
    digest = hashlib.sha256()
    for row in written:
        digest.update(row.key.encode() + b"\n")
    return digest.hexdigest()


def is_missing(cell: object) -> bool:
    """None and NaN are what readers make of an empty cell."""
    return cell is None or (isinstance(cell, float) and cell != cell)


def _written(rows: Rows, position: int) -> Written:
    record, form = rows.records[position], rows.form
    if form.kind == "template":
        return _write_template(rows, position)
    assert rows.column is not None, form
    cell = record.get(rows.column)
    if form.kind == "chat":
        messages = () if is_missing(cell) else read_messages(cell, rows.where(position))
        spoken = any(message["content"].strip() for message in messages if is_learned(message))
        return Written(messages=messages, is_empty=not spoken)
    text = _text_cell(cell, rows, position, rows.column)
    return Written(text=text, is_empty=not text.strip())


def is_whole_number(cell: object) -> bool:
    """True of a label that is a number: Python's or numpy's, but no truth value."""
    return isinstance(cell, Integral) and not isinstance(cell, bool)


def _write_template(rows: Rows, position: int) -> Written:
    prompt, completion = rows.form.template, rows.form.completion
    assert prompt is not None and completion is not None, rows.form
    in_prompt = _fields(rows, position, prompt)
    in_completion = _fields(rows, position, completion)
    text = fill_template(completion, in_completion)
    return Written(
        text=text,
        prompt=fill_template(prompt, in_prompt),
        is_empty=not text.strip() or _all_blank(in_prompt) or _all_blank(in_completion),
    )


def _fields(rows: Rows, position: int, template: str) -> dict[str, str]:
    record = rows.records[position]
    return {name: _field_cell(record.get(name), rows, position, name) for name in template_fields(template)}


def _all_blank(fields: Mapping[str, str]) -> bool:
    return bool(fields) and not any(text.strip() for text in fields.values())


def _field_cell(cell: object, rows: Rows, position: int, name: str) -> str:
    """A template's field: text, or a whole number (labels often are) as its digits."""
    if is_whole_number(cell):
        return _digits(cell, rows, position, name)
    return _text_cell(cell, rows, position, name)


def _text_cell(cell: object, rows: Rows, position: int, name: str) -> str:
    if isinstance(cell, str):
        return cell
    if is_missing(cell):
        return ""
    raise DataError(
        f"{rows.where(position)}: column {name!r} holds no text but a {type(cell).__name__}, {shortened(cell)}; "
        "choose another column or write it as text"
    )


def _digits(cell: Any, rows: Rows, position: int, name: str) -> str:  # Any: a whole number, Python's or numpy's
    try:
        return str(operator.index(cell))
    except ValueError:
        raise DataError(
            f"{rows.where(position)}: column {name!r} holds a number of very many digits; write it as text"
        ) from None

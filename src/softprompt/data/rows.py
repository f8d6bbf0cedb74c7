"""Rows before any tokenizer: the columns that a form needs, where each row comes from, its text, its label.

A template is text with `{column}` fields. A field is a column's whole name: there are no attributes, indices,
conversions or format specifications (`{a.b}` is the column called "a.b"), and nothing is looked up in a value. `{{` and
`}}` are literal braces.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import operator
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from numbers import Integral
from typing import Any, NamedTuple

from softprompt.compute_share import yield_point
from softprompt.config import TaskKind
from softprompt.data.messages import Message, is_learned, read_messages
from softprompt.errors import ConfigError, DataError, shortened
from softprompt.types import InputForm, brief_repr

_TOKENS = re.compile(r"\{\{|\}\}|\{([^{}]+)\}|[{}]|[^{}]+")


class TemplateToken(NamedTuple):
    """Literal text, or a field to be filled."""

    text: str  # the text itself, or the column's name
    is_field: bool


@lru_cache(maxsize=64)
def parse_template(template: str) -> tuple[TemplateToken, ...]:
    """The template's tokens in order. Raises ConfigError where a brace stands alone."""
    tokens = []
    for match in _TOKENS.finditer(template):
        token, field = match.group(), match.group(1)
        if token in ("{", "}"):
            raise ConfigError(
                f"template {template!r} has a single {token!r} at character {match.start() + 1}; "
                f"write {{column}} for a field and {token * 2!r} for the character itself"
            )
        tokens.append(TemplateToken(field, True) if field is not None else TemplateToken(_literal(token), False))
    return tuple(tokens)


def template_fields(template: str) -> tuple[str, ...]:
    """The columns that a template needs, each once, in order of appearance."""
    return tuple(dict.fromkeys(token.text for token in parse_template(template) if token.is_field))


def fill_template(template: str, fields: Mapping[str, str]) -> str:
    """The template with every field replaced by its text.

    Raises ConfigError for a broken template, DataError for a field that is not given.
    """
    require_fields(template, fields)
    return "".join(fields[token.text] if token.is_field else token.text for token in parse_template(template))


def require_fields(template: str, columns: Iterable[str], where: str = "") -> None:
    """Raises DataError for a field of the template that is no column."""
    names = list(columns)
    for field in template_fields(template):
        if field not in names:
            raise DataError(f"{where}template {template!r} asks for {field!r}; {known_columns(field, names)}")


def known_columns(wanted: str, columns: Iterable[str]) -> str:
    """The end of an error message: the columns there are, the nearest name first."""
    names = list(columns)
    near = difflib.get_close_matches(wanted.lower(), [name.lower() for name in names], n=1)
    listed = f"the columns are {', '.join(map(repr, names))}" if names else "there are no columns"
    if not near:
        return listed
    nearest = next(name for name in names if name.lower() == near[0])
    return f"did you mean {nearest!r}? {listed}"


def _literal(token: str) -> str:
    return token[0] if token in ("{{", "}}") else token


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows of one source with the form that turns them into text."""

    __repr__ = brief_repr

    records: tuple[Mapping[str, Any], ...]  # Any: cells are checked when they are read
    indices: tuple[int, ...]  # zero-based index in the source, one per record
    source: str  # file, folder or Hub id, for messages and for the run's record
    form: InputForm
    column: str | None = None  # the text or messages column; None where the form's template names the columns
    notes: tuple[str, ...] = ()  # for the user: unused columns, a guess

    def __len__(self) -> int:
        return len(self.records)

    def select(self, positions: Iterable[int]) -> Rows:
        """Some of these rows, by position here (not by source index), in the order given."""
        chosen = list(positions)
        return replace(
            self,
            records=tuple(self.records[position] for position in chosen),
            indices=tuple(self.indices[position] for position in chosen),
        )

    def take(self, positions: Iterable[int]) -> Rows:
        """The former name of `select`."""
        warnings.warn("Rows.take is now Rows.select", DeprecationWarning, stacklevel=2)
        return self.select(positions)

    def where(self, position: int) -> str:
        """The name of a row in messages: counted from 1, the header not counted."""
        return f"row {self.indices[position] + 1:,} of {self.source}"


class RowText(NamedTuple):
    """One row as text."""

    text: str = ""  # the target: the plain text or the completion
    prompt: str = ""  # kind "template": the text before the completion
    messages: tuple[Message, ...] = ()  # kind "chat"
    is_empty: bool = False  # no target: no text, no completion, no learned turn of the assistant

    @property
    def key(self) -> str:
        """Equal for rows with identical text."""
        return json.dumps([self.prompt, self.text, self.messages], ensure_ascii=False, sort_keys=True)


def render_row(rows: Rows, position: int) -> RowText:
    """A row's text.

    Raises DataError, naming the row, for a cell that is not text, half of a surrogate pair, and messages that are not
    a chat.
    """
    yield_point()
    text = _row_text(rows, position)
    try:
        (text.key if text.messages else f"{text.prompt}{text.text}").encode()
    except UnicodeEncodeError:
        raise DataError(f"{rows.where(position)} holds half of a surrogate pair, which is no text") from None
    return text


def render_rows(rows: Rows) -> list[RowText]:
    """All rows' text, in order. Raises DataError as `render_row` does."""
    return [render_row(rows, position) for position in range(len(rows))]


def rows_hash(rows: Rows) -> str:
    """sha256 (hex) of the rows' text, in order."""
    return text_hash(render_rows(rows))


def text_hash(texts: Sequence[RowText]) -> str:
    """sha256 (hex) of rendered rows, in order."""
    digest = hashlib.sha256()
    for row in texts:
        digest.update(row.key.encode() + b"\n")
    return digest.hexdigest()


def is_missing(cell: object) -> bool:
    """True for None and NaN, which readers make of an empty cell."""
    return cell is None or (isinstance(cell, float) and cell != cell)


def _row_text(rows: Rows, position: int) -> RowText:
    record, form = rows.records[position], rows.form
    if form.kind == "template":
        return _render_template(rows, position)
    assert rows.column is not None, form
    cell = record.get(rows.column)
    if form.kind == "chat":
        messages = () if is_missing(cell) else read_messages(cell, rows.where(position))
        has_words = any(message["content"].strip() for message in messages if is_learned(message))
        return RowText(messages=messages, is_empty=not has_words)
    text = _text_cell(cell, rows, position, rows.column)
    return RowText(text=text, is_empty=not text.strip())


def is_whole_number(cell: object) -> bool:
    """True for Python's and numpy's integers, but not for booleans."""
    return isinstance(cell, Integral) and not isinstance(cell, bool)


def _render_template(rows: Rows, position: int) -> RowText:
    prompt, completion = rows.form.template, rows.form.completion
    assert prompt is not None and completion is not None, rows.form
    in_prompt = _fields(rows, position, prompt)
    in_completion = _fields(rows, position, completion)
    text = fill_template(completion, in_completion)
    return RowText(
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


MAX_LABELS = 50  # distinct completions; more than that is free text
MIN_ROWS_PER_LABEL = 2  # mean over the labels


def labels_of(completions: Sequence[str]) -> tuple[str, ...]:
    """The distinct completions, sorted, if they look like a closed set of labels; else none."""
    distinct = sorted(set(completions))
    is_closed_set = 2 <= len(distinct) <= MAX_LABELS and len(completions) >= MIN_ROWS_PER_LABEL * len(distinct)
    return tuple(distinct) if is_closed_set else ()


def labelled_form(form: InputForm, texts: Sequence[RowText]) -> InputForm:
    """The form with the labels of these rows, unless it has labels already."""
    if form.kind != "template" or form.labels:
        return form
    return replace(form, labels=labels_of([row.text for row in texts if not row.is_empty]))


def task_of(form: InputForm) -> TaskKind:
    """What rows of this form are trained for; the form names their labels if they have any."""
    if form.task != "generate":
        return form.task
    if form.kind == "template":
        return "labels" if form.labels else "answers"
    return "chat" if form.kind == "chat" else "text"


def with_labels(rows: Rows) -> Rows:
    """The rows with their labels in the form."""
    if rows.form.kind != "template" or rows.form.labels:
        return rows
    return replace(rows, form=labelled_form(rows.form, render_rows(rows)))

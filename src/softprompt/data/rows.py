"""Rows before any tokenizer: the columns that a form needs, where each row comes from, its text, its label.

A template is text with `{column}` fields. A field is a column's whole name: there are no attributes, indices,
conversions or format specifications (`{a.b}` is the column called "a.b"), and nothing is looked up in a value. `{{` and
`}}` are literal braces.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from types import MappingProxyType
from typing import Any, NamedTuple

from softprompt.compute_share import yield_point
from softprompt.config import TaskKind
from softprompt.data.cells import answer_cell, field_cell, is_missing, tag_cell, text_cell, word_cell
from softprompt.data.messages import Message, is_learned, read_messages
from softprompt.errors import ConfigError, DataError
from softprompt.types import InputForm, Task, brief_repr

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
    label_columns: tuple[str, str] | None = None  # text and label, where the template was made of these columns
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
    parts: tuple[str, ...] = ()  # task "tag": words; "answer": question and context; "embed": anchor, positive and more
    fields: Mapping[str, str] = MappingProxyType({})  # kind "template": what the prompt's fields were filled with
    answers: tuple[Any, ...] = ()  # task "tag": the words' tags; "answer": pairs of a text and its start, or None

    @property
    def key(self) -> str:
        """Equal for rows with identical text."""
        found = [self.prompt, self.text, self.messages, *((self.parts, self.answers) if self.parts else ())]
        return json.dumps(found, ensure_ascii=False, sort_keys=True)


def render_row(rows: Rows, position: int) -> RowText:
    """A row's text.

    Raises DataError, naming the row, for a cell that is not text, half of a surrogate pair, and messages that are not
    a chat.
    """
    yield_point()
    text = _row_text(rows, position)
    whole_text(text.key if text.messages or text.parts else f"{text.prompt}{text.text}", rows, position)
    return text


def render_rows(rows: Rows) -> list[RowText]:
    """All rows' text, in order. Raises DataError as `render_row` does."""
    return [render_row(rows, position) for position in range(len(rows))]


def render_prompt(rows: Rows, position: int) -> str:
    """Of a row in a template, the text before the completion, which the row need not have; "" where it has no text.

    Raises DataError as `render_row` does.
    """
    yield_point()
    assert rows.form.template is not None, rows.form
    fields = _fields(rows, position, rows.form.template)
    return "" if _all_blank(fields) else whole_text(fill_template(rows.form.template, fields), rows, position)


def render_text(rows: Rows, position: int) -> str:
    """The text in the rows' column. Raises DataError as `render_row` does."""
    yield_point()
    assert rows.column is not None, rows.form
    cell = rows.records[position].get(rows.column)
    return whole_text(text_cell(cell, rows.where(position), rows.column), rows, position)


def whole_text(text: str, rows: Rows, position: int) -> str:
    """The text. Raises DataError for half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(f"{rows.where(position)} holds half of a surrogate pair, which is no text") from None
    return text


def rows_hash(rows: Rows) -> str:
    """sha256 (hex) of the rows' text, in order."""
    return text_hash(render_rows(rows))


def text_hash(texts: Sequence[RowText]) -> str:
    """sha256 (hex) of rendered rows, in order."""
    digest = hashlib.sha256()
    for row in texts:
        digest.update(row.key.encode() + b"\n")
    return digest.hexdigest()


def _row_text(rows: Rows, position: int) -> RowText:
    record, form = rows.records[position], rows.form
    if form.task in _RENDERED_AS_PARTS:
        return _RENDERED_AS_PARTS[form.task](rows, position)
    if form.kind == "template":
        return _render_template(rows, position)
    assert rows.column is not None, form
    cell = record.get(rows.column)
    if form.kind == "chat":
        messages = () if is_missing(cell) else read_messages(cell, rows.where(position))
        has_words = any(message["content"].strip() for message in messages if is_learned(message))
        return RowText(messages=messages, is_empty=not has_words)
    text = text_cell(cell, rows.where(position), rows.column)
    return RowText(text=text, is_empty=not text.strip())


def _render_template(rows: Rows, position: int) -> RowText:
    prompt, completion = rows.form.template, rows.form.completion
    assert prompt is not None and completion is not None, rows.form
    in_prompt = _fields(rows, position, prompt)
    in_completion = _fields(rows, position, completion)
    text = fill_template(completion, in_completion)
    text = text if rows.form.task == "generate" else text.strip()  # the name of a class
    return RowText(
        text=text,
        prompt=fill_template(prompt, in_prompt),
        fields=in_prompt,
        is_empty=not text.strip() or _all_blank(in_prompt) or _all_blank(in_completion),
    )


def _fields(rows: Rows, position: int, template: str) -> dict[str, str]:
    record = rows.records[position]
    where = rows.where(position)
    return {name: field_cell(record.get(name), where, name) for name in template_fields(template)}


def _all_blank(fields: Mapping[str, str]) -> bool:
    return bool(fields) and not any(text.strip() for text in fields.values())


def form_columns(form: InputForm) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The columns that a form's template reads, and those of its completion."""
    assert form.template is not None and form.completion is not None, form
    return template_fields(form.template), template_fields(form.completion)


def _render_tagged(rows: Rows, position: int) -> RowText:
    """Words and a tag for each; no tags where the row has none, as those that are to be predicted."""
    record, where = rows.records[position], rows.where(position)
    (words_column,), (tags_column,) = form_columns(rows.form)
    words = word_cell(record.get(words_column), where, words_column)
    tags = tag_cell(record.get(tags_column), where, tags_column)
    if tags and len(tags) != len(words):
        raise DataError(
            f"{where}: column {words_column!r} has {len(words):,} words and column {tags_column!r} {len(tags):,} tags; "
            "give each word one tag"
        )
    return RowText(prompt=" ".join(words), parts=words, answers=tags, is_empty=not "".join(words).strip())


def _render_answered(rows: Rows, position: int) -> RowText:
    """Question and context, and the answers with where each begins in the context, if that is known."""
    record, where = rows.records[position], rows.where(position)
    inputs, (answers_column, *start_column) = form_columns(rows.form)
    question, context = (text_cell(record.get(name), where, name) for name in (inputs[0], inputs[-1]))
    starts = record.get(start_column[0]) if start_column else None
    answers = answer_cell(record.get(answers_column), starts, where, answers_column)
    return RowText(prompt=question, parts=(question, context), answers=answers, is_empty=not context.strip())


def _render_embedded(rows: Rows, position: int) -> RowText:
    """The anchor and the other texts; negative ones may be missing."""
    record, where = rows.records[position], rows.where(position)
    (anchor,), others = form_columns(rows.form)
    parts = tuple(text_cell(record.get(name), where, name) for name in (anchor, *others))
    parts = (parts[0], *(text for number, text in enumerate(parts[1:]) if number == 0 or text.strip()))
    return RowText(prompt=parts[0], parts=parts, is_empty=not all(text.strip() for text in parts))


_RENDERED_AS_PARTS: Mapping[Task, Callable[[Rows, int], RowText]] = {
    "tag": _render_tagged, "answer": _render_answered, "embed": _render_embedded,
}  # fmt: skip


MAX_LABELS = 50  # distinct completions; more than that is free text
MIN_ROWS_PER_LABEL = 2  # mean over the labels


def labels_of(completions: Sequence[str]) -> tuple[str, ...]:
    """The distinct completions, sorted, if they look like a closed set of labels; else none."""
    distinct = sorted(set(completions))
    is_closed_set = 2 <= len(distinct) <= MAX_LABELS and len(completions) >= MIN_ROWS_PER_LABEL * len(distinct)
    return tuple(distinct) if is_closed_set else ()


def in_label_order(labels: Iterable[str]) -> tuple[str, ...]:
    """The distinct labels, sorted: whole numbers by value."""
    distinct = sorted(set(labels))
    return tuple(
        sorted(distinct, key=int) if all(text.isdecimal() and text.isascii() for text in distinct) else distinct
    )


def labelled_form(form: InputForm, texts: Sequence[RowText]) -> InputForm:
    """The form with the labels of these rows, unless it has labels already.

    A task that has a class for each label has as many as there are; completions that are generated are labels only
    where they look like a closed set.
    """
    if form.kind != "template" or form.labels or form.task in ("answer", "embed"):
        return form
    if form.task == "generate":
        return replace(form, labels=labels_of([row.text for row in texts if not row.is_empty]))
    tags = (tag for row in texts for tag in row.answers if tag is not None)
    found = tags if form.task == "tag" else (row.text for row in texts if not row.is_empty)
    return replace(form, labels=in_label_order(found))


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

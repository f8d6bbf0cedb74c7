"""Whether a file's lines are rows to train on: JSON lines of one form, each with something to learn.

Read line by line, so that a large file is never in memory; problems have line numbers, so that a file can
be mended.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

from softprompt.data.messages import check_row_keys
from softprompt.data.rows import Rows, render_row
from softprompt.data.textfiles import JsonLine, iter_json_lines, json_problem
from softprompt.errors import DataError
from softprompt.types import InputForm, Task

_BOM = b"\xef\xbb\xbf"
_LONGEST_LINE = 16 * 2**20  # bytes
_NUM_SHOWN = 5  # broken lines that a refusal tells
_LONGEST_PROBLEM = 200  # characters of a problem in the message
_BREAK_BYTES = 2**16  # lines of so many bytes, then other threads get a turn
_BREAK_S = 0.0005

RowForm = Literal["template", "chat", "plain", "label", "tag", "answer", "embed"]


class _Form(NamedTuple):
    """What the lines of one form hold, and how `softprompt.data` reads each."""

    columns: tuple[str, ...]
    spoken: str
    learned: str  # what a line without it lacks
    form: InputForm


def _template(template: str, completion: str, task: Task = "generate") -> InputForm:
    return InputForm(kind="template", template=template, completion=completion, task=task)


_FORMS: dict[RowForm, _Form] = {
    "template": _Form(
        ("prompt", "completion"), "prompt and completion", "prompt and completion must not be blank",
        _template("{prompt}", "{completion}"),
    ),
    "chat": _Form(
        ("messages",), "messages", 'one turn of the assistant must have words and no "weight": 0',
        InputForm(kind="chat"),
    ),
    "label": _Form(
        ("text", "label"), "text and label", "text and label must not be blank", _template("{text}", "{label}")
    ),
    "plain": _Form(("text",), "text", "text must not be blank", InputForm(kind="plain")),
    "tag": _Form(
        ("tokens", "tags"), "tokens and tags", "one token must not be blank", _template("{tokens}", "{tags}", "tag")
    ),
    "answer": _Form(
        ("question", "context", "answers"), "question, context and answers", "the context must not be blank",
        _template("{question}\n{context}", "{answers}", "answer"),
    ),
    "embed": _Form(
        ("anchor", "positive"), "anchor and positive", "anchor and positive must not be blank",
        _template("{anchor}", "{positive}", "embed"),
    ),
}  # fmt: skip


@dataclass
class CheckedRows:
    """What a file of rows holds."""

    num_rows: int = 0
    form: RowForm | None = None  # of all rows
    problems: list[str] = field(default_factory=list)  # of the first broken lines
    num_broken: int = 0


def check_rows(path: Path) -> CheckedRows:
    """The rows of a file. Raises DataError that names the first broken lines, or says that there is no row."""
    found = CheckedRows()
    with open(path, "rb") as file:
        for line in iter_json_lines(_lines(file), max_length=_LONGEST_LINE):
            _check_line(found, line)
    if found.num_broken:
        raise DataError(_problems(found))
    if found.form is None:
        raise DataError(f"the file is empty; {_EXPECTED}")
    return found


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """All lines; of one that is too long only the beginning."""
    is_first, until_break = True, _BREAK_BYTES
    while line := file.readline(_LONGEST_LINE + 1):
        if len(line) > _LONGEST_LINE:
            _skip_line(file, line)
        yield line.removeprefix(_BOM) if is_first else line
        is_first = False
        until_break -= len(line)
        if until_break <= 0:  # JSON is parsed under the interpreter's lock, while requests are being answered
            until_break = _BREAK_BYTES
            time.sleep(_BREAK_S)


def _skip_line(file: BinaryIO, line: bytes) -> None:
    while line and not line.endswith(b"\n"):
        line = file.readline(_LONGEST_LINE)


def _check_line(found: CheckedRows, line: JsonLine) -> None:
    number = line.number
    try:
        form = _form_of(line)
        if found.form is not None and form != found.form:
            raise DataError(f"line {number:,} holds {_FORMS[form].spoken}, but the rows before it "
                            f"{_FORMS[found.form].spoken}; a file is of one form")  # fmt: skip
    except DataError as error:
        found.num_broken += 1
        if len(found.problems) < _NUM_SHOWN:
            found.problems.append(_shortened(str(error)))
        return
    found.form = form
    found.num_rows += 1


def _form_of(line: JsonLine) -> RowForm:
    """The form of one row that can be learned from. Raises DataError."""
    where = f"line {line.number:,}"
    if line.error is not None:
        raise DataError(f"{where} {json_problem(line.error)}") from line.error
    record = line.value
    if not isinstance(record, dict):
        raise DataError(f"{where} is no JSON object but a {type(record).__name__}")
    form = _form_by_keys(record, where)
    known = _FORMS[form]
    column = None if known.form.kind == "template" else known.columns[0]
    rows = Rows(records=(record,), indices=(line.number - 1,), source="", form=known.form, column=column)
    try:
        check_row_keys(record, known.columns, known.form.kind, rows.where(0))
        written = render_row(rows, 0)
    except DataError as error:  # it opens with where the row is
        raise DataError(f"{where}{str(error).removeprefix(rows.where(0))}") from error
    if written.is_empty:
        raise DataError(f"{where} has nothing to learn: {known.learned}")
    return form


def _form_by_keys(record: dict[str, Any], where: str) -> RowForm:
    """By the keys that are there; a text is plain only where it has no label beside it."""
    given: list[RowForm] = [form for form, known in _FORMS.items() if any(name in record for name in known.columns)]
    if "label" in given and "plain" in given:
        given.remove("plain" if "label" in record else "label")
    if len(given) != 1:
        which = f"holds {' beside '.join(_FORMS[form].spoken for form in given)}" if given else f"has {_keys(record)}"
        raise DataError(f"{where} {which}; {_EXPECTED}")
    missing = [name for name in _FORMS[given[0]].columns if record.get(name) is None]
    if missing:
        raise DataError(f"{where} has no {' and no '.join(missing)}")
    return given[0]


def _keys(record: dict[str, Any]) -> str:
    return f"the keys {', '.join(map(repr, list(record)[:5]))}"[:100] if record else "no keys"


def _problems(found: CheckedRows) -> str:
    more = found.num_broken - len(found.problems)
    rest = f"; and {more:,} more broken lines" if more else ""
    return f"the file's rows cannot be used: {'; '.join(found.problems)}{rest}"


def _shortened(problem: str) -> str:
    shown = problem.encode("utf-8", "backslashreplace").decode()  # half a surrogate pair cannot be sent
    return shown if len(shown) <= _LONGEST_PROBLEM else f"{shown[: _LONGEST_PROBLEM - 3]}..."


_EXPECTED = (
    'give one JSON object per line: {"prompt", "completion"}, {"messages"}, {"text"}, {"text", "label"}, '
    '{"tokens", "tags"}, {"question", "context", "answers"} or {"anchor", "positive"}'
)

"""Whether a file's lines are rows to train on: JSON lines of one form, each with something to learn.

Read line by line, so that a large file is never in memory; told with line numbers, so that a broken one can be mended.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from softprompt.data.messages import check_row_keys
from softprompt.data.rows import Rows, write_row
from softprompt.data.textfiles import RepeatedKeyError, load_json
from softprompt.errors import DataError
from softprompt.types import FormKind, InputForm

_BOM = b"\xef\xbb\xbf"
_LONGEST_LINE = 16 * 2**20  # bytes
_NUM_SHOWN = 5  # broken lines that a refusal tells
_LONGEST_PROBLEM = 200  # characters of what is told of one
_BREATH_BYTES = 2**16  # lines of so many bytes, then other threads get a turn
_BREATH_S = 0.0005

# What the lines of each form hold, and how `softprompt.data` reads it.
_COLUMNS: dict[FormKind, tuple[str, ...]] = {
    "template": ("prompt", "completion"),
    "chat": ("messages",),
    "plain": ("text",),
}
_FORMS: dict[FormKind, InputForm] = {
    "template": InputForm(kind="template", template="{prompt}", completion="{completion}"),
    "chat": InputForm(kind="chat"),
    "plain": InputForm(kind="plain"),
}
_SPOKEN: dict[FormKind, str] = {"template": "prompt and completion", "chat": "messages", "plain": "text"}
_LEARNED: dict[FormKind, str] = {
    "template": "prompt and completion must not be blank",
    "chat": 'one turn of the assistant must have words and no "weight": 0',
    "plain": "text must not be blank",
}


@dataclass
class CheckedRows:
    """What a file of rows holds."""

    num_rows: int = 0
    form: FormKind | None = None  # of all rows
    problems: list[str] = field(default_factory=list)  # of the first broken lines
    num_broken: int = 0


def check_rows(path: Path) -> CheckedRows:
    """The rows of a file. Raises DataError that names the first broken lines, or says that there is no row."""
    found = CheckedRows()
    with open(path, "rb") as file:
        for number, line in _lines(file):
            _check_line(found, number, line)
    if found.num_broken:
        raise DataError(_told(found))
    if found.form is None:
        raise DataError(f"the file is empty; {_EXPECTED}")
    return found


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """Lines that are not blank, by number from 1; None for one that is too long."""
    number, until_breath = 0, _BREATH_BYTES
    while line := file.readline(_LONGEST_LINE + 1):
        number += 1
        is_long = len(line) > _LONGEST_LINE
        if is_long:
            _skip_line(file, line)
        if number == 1:
            line = line.removeprefix(_BOM)
        if is_long or line.strip():
            yield number, None if is_long else line
        until_breath -= len(line)
        if until_breath <= 0:  # JSON is read under the interpreter's lock, and requests are being answered meanwhile
            until_breath = _BREATH_BYTES
            time.sleep(_BREATH_S)


def _skip_line(file: BinaryIO, line: bytes) -> None:
    while line and not line.endswith(b"\n"):
        line = file.readline(_LONGEST_LINE)


def _check_line(found: CheckedRows, number: int, line: bytes | None) -> None:
    try:
        form = _form_of(line, number)
        if found.form is not None and form != found.form:
            raise DataError(f"line {number:,} holds {_SPOKEN[form]}, but the rows before it {_SPOKEN[found.form]}; "
                            "a file is of one form")  # fmt: skip
    except DataError as error:
        found.num_broken += 1
        if len(found.problems) < _NUM_SHOWN:
            found.problems.append(_shortened(str(error)))
        return
    found.form = form
    found.num_rows += 1


def _form_of(line: bytes | None, number: int) -> FormKind:
    """The form of one row that can be learned from. Raises DataError."""
    record = _record(line, f"line {number:,}")
    form = _form_by_keys(record, f"line {number:,}")
    column = None if form == "template" else _COLUMNS[form][0]
    rows = Rows(records=(record,), indices=(number - 1,), source="", form=_FORMS[form], column=column)
    try:
        check_row_keys(record, _COLUMNS[form], form, rows.where(0))
        written = write_row(rows, 0)
    except DataError as error:  # it opens with where the row is
        raise DataError(f"line {number:,}{str(error).removeprefix(rows.where(0))}") from error
    if written.is_empty:
        raise DataError(f"line {number:,} has nothing to learn: {_LEARNED[form]}")
    return form


def _record(line: bytes | None, where: str) -> dict[str, Any]:
    if line is None:
        raise DataError(f"{where} is longer than {_LONGEST_LINE:,} bytes")
    try:
        record = load_json(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not UTF-8 (byte {error.start + 1:,} of it)") from error
    except RepeatedKeyError as error:
        raise DataError(f"{where} {error}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON ({_reason(error)})") from error
    if not isinstance(record, dict):
        raise DataError(f"{where} is no JSON object but a {type(record).__name__}")
    return record


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg.removesuffix(' at').removesuffix(' starting')}, column {error.colno:,}"
    return "nested too deeply"


def _form_by_keys(record: dict[str, Any], where: str) -> FormKind:
    given = [form for form, columns in _COLUMNS.items() if any(name in record for name in columns)]
    if len(given) != 1:
        which = f"holds {' beside '.join(_SPOKEN[form] for form in given)}" if given else f"has {_keys(record)}"
        raise DataError(f"{where} {which}; {_EXPECTED}")
    missing = [name for name in _COLUMNS[given[0]] if record.get(name) is None]
    if missing:
        raise DataError(f"{where} has no {' and no '.join(missing)}")
    return given[0]


def _keys(record: dict[str, Any]) -> str:
    return f"the keys {', '.join(map(repr, list(record)[:5]))}"[:100] if record else "no keys"


def _told(found: CheckedRows) -> str:
    more = found.num_broken - len(found.problems)
    rest = f"; and {more:,} more broken lines" if more else ""
    return f"the file's rows cannot be used: {'; '.join(found.problems)}{rest}"


def _shortened(problem: str) -> str:
    shown = problem.encode("utf-8", "backslashreplace").decode()  # half a surrogate pair cannot be sent
    return shown if len(shown) <= _LONGEST_PROBLEM else f"{shown[: _LONGEST_PROBLEM - 3]}..."


_EXPECTED = 'give one JSON object per line: {"prompt", "completion"}, {"messages"} or {"text"}'

"""Records from text files: lines, JSON, CSV and TSV. Values are exactly the text in the file; errors name their line.

A CSV file quotes as in RFC 4180. A TSV file has no quoting (IANA's text/tab-separated-values): a row is a line, and
quote marks are characters. A file with tabs that a CSV writer made is recognised by writing it again: only then is the
result the same text.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from softprompt.compute_share import yield_point
from softprompt.errors import DataError

Record = dict[str, Any]  # Any: JSON and Parquet cells are checked when they are asked for

_UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # what Excel's "Unicode text" begins with
_PLAIN_ENDINGS = (".txt", ".text")  # whose text may be about web pages
_WEB_PAGE = ("<!doctype html", "<html")  # often downloaded instead of a file
_MOST_DIGITS = 4_300  # of a whole number that Python parses


class FileRecords(NamedTuple):
    """The records of a file, and notes for the user on how it was read."""

    records: list[Record]
    notes: tuple[str, ...] = ()


class RepeatedKeyError(ValueError):
    """A JSON object has a key twice: parsing would drop one value."""


class LongLineError(ValueError):
    """A line is longer than its reader allows."""


def read_text(path: Path) -> str:
    """A file's text: UTF-8 with or without a byte order mark, or UTF-16 with one.

    Raises DataError naming the line of a wrong byte, and for content that is not text.
    """
    raw = path.read_bytes()
    encoding = "utf-16" if raw.startswith(_UTF16_MARKS) else "utf-8-sig"
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path} is not {encoding.upper().removesuffix('-SIG')}: byte 0x{raw[error.start]:02x} in line {line:,} "
            f"(byte {error.start:,} of the file); save it as UTF-8"
        ) from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise DataError(f"{path}, line {line:,} holds a NUL character: it is no text, or not UTF-8; save it so")
    refuse_web_page(path, text)
    return text


def refuse_web_page(path: Path, text: str) -> None:
    """Raises DataError for HTML where data is expected; `text` is the file's, or its beginning."""
    if path.suffix.lower() not in _PLAIN_ENDINGS and text[:200].lstrip().lower().startswith(_WEB_PAGE):
        raise DataError(f"{path} is a web page (HTML), not data; download the file itself")


def text_encoding(path: Path) -> str:
    """UTF-8, whose mark is left out, or UTF-16 where the file begins with its mark."""
    with open(path, "rb") as file:
        return "utf-16" if file.read(2) in _UTF16_MARKS else "utf-8-sig"


def read_lines(path: Path) -> list[Record]:
    """One record {"text": line} per line. Lines end at a newline alone, not at the other marks Unicode has."""
    text = read_text(path).replace("\r\n", "\n")
    return [{"text": line} for line in text.removesuffix("\n").split("\n")] if text else []


def read_json(path: Path) -> list[Record]:
    """Records of a JSON list of objects, or of JSON lines; a string instead of an object is a record {"text": string}.

    Raises DataError naming the line that is not JSON or not an object.
    """
    text = read_text(path)
    if not text.lstrip().startswith("["):
        return list(iter_json_records(path, text.split("\n")))
    return [_object(path, position, item) for position, item in _json_list(path, text)]


def iter_json_records(path: Path, lines: Iterable[str]) -> Iterator[Record]:
    """The same of JSON lines, one record at a time."""
    for line in iter_json_lines(lines):
        if line.error is not None:
            raise _broken_json(path, f", line {line.number:,}", line.error) from line.error
        yield _object(path, f"line {line.number:,}", line.value)


def load_json(text: str) -> Any:  # Any: whatever JSON holds
    """The value; a whole number of more digits than Python reads becomes its digits as text.

    Raises json.JSONDecodeError, RepeatedKeyError, or RecursionError where it is nested too deeply.
    """
    try:
        return json.loads(text, object_pairs_hook=_without_repeats)
    except (json.JSONDecodeError, RepeatedKeyError):
        raise
    except ValueError:  # slower, so only then
        return json.loads(text, object_pairs_hook=_without_repeats, parse_int=_whole_number)


def json_problem(error: Exception) -> str:
    """Why `load_json` failed, for a sentence that begins with the position."""
    if isinstance(error, UnicodeDecodeError):
        return f"is not UTF-8 (byte {error.start + 1:,} of it)"
    if isinstance(error, json.JSONDecodeError):
        return f"is not JSON ({error.msg.removesuffix(' at').removesuffix(' starting')}, column {error.colno:,})"
    return str(error) if isinstance(error, (RepeatedKeyError, LongLineError)) else "is not JSON (nested too deeply)"


class JsonLine(NamedTuple):
    """One line of JSON lines: its value, or why it has none."""

    number: int  # from 1, blank lines counted
    value: Any  # Any: whatever JSON holds
    error: Exception | None  # for `json_problem`


def iter_json_lines(lines: Iterable[str | bytes], *, max_length: int | None = None) -> Iterator[JsonLine]:
    """The lines that are not blank, one at a time; a broken line does not end the iteration. Bytes are UTF-8.

    `max_length` is in the units of a line, bytes or characters.
    """
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield_point()
            yield _json_line(number, line, max_length)


def _json_line(number: int, line: str | bytes, max_length: int | None) -> JsonLine:
    try:
        if max_length is not None and len(line) > max_length:
            raise LongLineError(f"is longer than {max_length:,} {'characters' if isinstance(line, str) else 'bytes'}")
        return JsonLine(number, load_json(line if isinstance(line, str) else line.decode("utf-8")), None)
    except (ValueError, RecursionError) as error:
        return JsonLine(number, None, error)


def _without_repeats(pairs: list[tuple[str, Any]]) -> Record:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise RepeatedKeyError(f"has the key {twice!r} twice in one object")
    return found


def _whole_number(digits: str) -> int | str:
    return int(digits) if len(digits) <= _MOST_DIGITS else digits


def _json_list(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    try:
        items = load_json(text)
    except (ValueError, RecursionError) as error:
        position = f", line {error.lineno:,}" if isinstance(error, json.JSONDecodeError) else ""
        raise _broken_json(path, position, error) from error
    yield from ((f"item {number:,}", item) for number, item in enumerate(items, start=1))


def _broken_json(path: Path, position: str, error: Exception) -> DataError:
    what_to_do = "keep one" if isinstance(error, RepeatedKeyError) else "give one object per line, or a list of objects"
    return DataError(f"{path}{position} {json_problem(error)}; {what_to_do}")


def _object(path: Path, position: str, item: Any) -> Record:
    if isinstance(item, str):
        return {"text": item}
    if not isinstance(item, dict):
        raise DataError(f"{path}, {position} is a {type(item).__name__}; give objects with named columns")
    return item


_LINE_END = re.compile(r"\r\n|\r|\n")
_DECLARED = re.compile(r"sep=([^\r\n])(\r\n|\r|\n)")  # Excel's own first line
_OTHER_DELIMITERS = (";", "\t", "|", ",")  # in the order in which they are looked for
_CHECKED_ROWS = 50  # at the start of a file, to find its delimiter
_MULTI_LINE_HINT = "a row of a TSV is one line; give delimiter '\\t' to read its quote marks as those of a CSV"


class CsvRow(NamedTuple):
    """The cells of one row of a table."""

    cells: list[str]
    line: int  # its last, counted from 1


def read_delimited(path: Path, *, usual: str, delimiter: str | None = None) -> FileRecords:
    """Records of a file with a header line. `usual` is the delimiter of its ending, `delimiter` the user's; without
    one, the first line decides, and a note reports it.

    Raises DataError for a line with more or fewer cells than the header, a broken quotation, or a name given twice.
    """
    text = read_text(path)
    chosen = choose_delimiter(path, text, usual=usual, delimiter=delimiter)
    if chosen.is_literal:
        return _tsv(path, without_declaration(text))
    lines = io.StringIO(without_declaration(text), newline="")  # keeps line breaks inside quoted cells as they are
    return FileRecords(list(table_records(path, csv_rows(path, lines, chosen.mark))), chosen.notes)


class Delimiter(NamedTuple):
    """What separates the cells of a file."""

    mark: str
    is_literal: bool = False  # a TSV, whose quote marks are characters
    notes: tuple[str, ...] = ()


def choose_delimiter(path: Path, text: str, *, usual: str, delimiter: str | None = None) -> Delimiter:
    """See `read_delimited`; of `text`, the file's, the beginning suffices."""
    declared = _DECLARED.match(text)
    mark = delimiter or (declared[1] if declared is not None else _found(path, without_declaration(text), usual))
    notes = (f"cells are separated by {_shown(mark)}",) if mark != usual and delimiter is None else ()
    return Delimiter(mark, mark == usual == "\t" and delimiter is None, notes)


def without_declaration(text: str) -> str:
    """The text without Excel's first line; that line stays, blank, so that lines keep their numbers."""
    declared = _DECLARED.match(text)
    return text if declared is None else declared[2] + text[declared.end() :]


def _found(path: Path, text: str, usual: str) -> str:
    """The delimiter of a file: the usual one or, if the first line lacks it, another that it contains.

    Raises DataError where that does not fit the rows: they would be read as one column.
    """
    header = next((line for line in _LINE_END.split(text[: 2**16]) if line.strip()), "")
    other = next((mark for mark in _OTHER_DELIMITERS if mark != usual and mark in header), None)
    if usual in header or other is None:
        return usual
    rows = _first_rows(text, other)
    width = len(rows[0].cells) if rows else 0
    odd = next((row for row in rows if len(row.cells) != width), None)
    if width < 2:
        return usual
    if odd is None:
        return other
    raise DataError(
        f"{path}: its first line has no {_shown(usual)} and looks separated by {_shown(other)}, but line {odd.line:,} "
        f"has {len(odd.cells)} cells where it has {width}; give the separator of the cells with --delimiter"
    )


def _first_rows(text: str, delimiter: str) -> list[CsvRow]:
    """The first rows, up to a broken one."""
    rows: list[CsvRow] = []
    with _long_cells():
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        try:
            for cells in reader:
                if cells:
                    rows.append(CsvRow(cells, reader.line_num))
                if len(rows) > _CHECKED_ROWS:
                    break
        except csv.Error:
            pass  # reported when the whole file is read
    return rows


def csv_rows(path: Path, lines: Iterable[str], delimiter: str) -> Iterator[CsvRow]:
    """The rows that are not blank; `lines` have their ends. Raises DataError for a broken quotation."""
    with _long_cells():
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        try:
            yield from (CsvRow(cells, reader.line_num) for cells in reader if cells)
        except csv.Error as error:
            raise DataError(f"{path}, line {reader.line_num:,}: broken CSV ({error}); correct the quotes") from error


def literal_rows(lines: Iterable[str]) -> Iterator[CsvRow]:
    """The rows of a TSV, whose lines have no quoting; `lines` have no ends."""
    return (CsvRow(line.split("\t"), number) for number, line in enumerate(lines, start=1) if line)


def _tsv(path: Path, text: str) -> FileRecords:
    literal = list(literal_rows(_LINE_END.split(text)))
    if '"' not in text:
        return FileRecords(list(table_records(path, literal)))
    quoted = _quoted(path, text)
    if quoted is not None and (not _is_even(literal) or len(quoted) == len(literal)):
        note = "cells in quote marks are read as a CSV's, without them"
        return FileRecords(list(table_records(path, quoted)), (note,))
    if not _is_even(literal):
        raise DataError(f"{path}, line {_uneven(literal).line:,}: {_counts(literal)}; {_MULTI_LINE_HINT}")
    num_cells = sum(cell.startswith('"') for row in literal for cell in row.cells)
    cells = "a cell" if num_cells == 1 else f"{num_cells:,} cells"
    note = f"quote marks at the start of {cells} are characters, and each line is a row, as in any TSV"
    return FileRecords(list(table_records(path, literal)), (note,) if num_cells else ())


def _quoted(path: Path, text: str) -> list[CsvRow] | None:
    """The rows of a file that a CSV writer made, recognised by writing them again: the text is the same."""
    try:
        rows = list(csv_rows(path, io.StringIO(text, newline=""), "\t"))
    except DataError:
        return None
    ways = (csv.QUOTE_MINIMAL, csv.QUOTE_ALL)
    return rows if _is_even(rows) and any(_round_trips(rows, text, way) for way in ways) else None


def _round_trips(rows: Sequence[CsvRow], text: str, quoting: int) -> bool:
    end = "\r\n" if "\r\n" in text else "\n"
    file = io.StringIO(newline="")
    csv.writer(file, delimiter="\t", quoting=quoting, lineterminator=end).writerows(row.cells for row in rows)  # type: ignore[arg-type]  # one of csv's constants
    return file.getvalue().removesuffix(end) == text.removesuffix(end)


def _is_even(rows: Sequence[CsvRow]) -> bool:
    return all(len(row.cells) == len(rows[0].cells) for row in rows)


def _uneven(rows: Sequence[CsvRow]) -> CsvRow:
    return next(row for row in rows if len(row.cells) != len(rows[0].cells))


def _counts(rows: Sequence[CsvRow]) -> str:
    return _count(_uneven(rows), len(rows[0].cells))


def _count(row: CsvRow, width: int) -> str:
    return f"{len(row.cells)} cells where the first line names {width} columns"


def table_records(path: Path, rows: Iterable[CsvRow]) -> Iterator[Record]:
    """The records below a header. Raises DataError for a name given twice and for a row of another width."""
    left = iter(rows)
    header = table_header(path, left)
    for row in left:
        if len(row.cells) != len(header):
            why = _count(row, len(header))
            raise DataError(f"{path}, line {row.line:,}: {why}; quote cells that hold the separator")
        yield dict(zip(header, row.cells, strict=True))


def table_header(path: Path, rows: Iterator[CsvRow]) -> list[str]:
    """The names of the columns, from the first of the rows. Raises as `table_records` does."""
    first = next(rows, None)
    if first is None:
        raise DataError(f"{path} is empty; the first line must name the columns")
    twice = next((name for name in first.cells if first.cells.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{path}: column {twice!r} stands twice in the first line; rename one")
    return first.cells


def _shown(delimiter: str) -> str:
    return {"\t": "tabs", ",": "commas"}.get(delimiter, repr(delimiter))


@contextmanager
def _long_cells() -> Iterator[None]:
    """Lift the csv module's limit of 128 KiB on a cell."""
    limit = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        yield
    finally:
        csv.field_size_limit(limit)

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
    if path.suffix.lower() not in _PLAIN_ENDINGS and text[:200].lstrip().lower().startswith(_WEB_PAGE):
        raise DataError(f"{path} is a web page (HTML), not data; download the file itself")
    return text


def read_lines(path: Path) -> list[Record]:
    """One record {"text": line} per line. Lines end at a newline alone, not at the other marks Unicode has."""
    text = read_text(path).replace("\r\n", "\n")
    return [{"text": line} for line in text.removesuffix("\n").split("\n")] if text else []


def read_json(path: Path) -> list[Record]:
    """Records of a JSON list of objects, or of JSON lines; a string instead of an object is a record {"text": string}.

    Raises DataError naming the line that is not JSON or not an object.
    """
    text = read_text(path)
    items = _json_list(path, text) if text.lstrip().startswith("[") else _json_lines(path, text)
    return [_object(path, position, item) for position, item in items]


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


def _json_lines(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    for line in iter_json_lines(text.split("\n")):
        if line.error is not None:
            raise _broken_json(path, f", line {line.number:,}", line.error) from line.error
        yield f"line {line.number:,}", line.value


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


class _CsvRow(NamedTuple):
    cells: list[str]
    line: int  # its last, counted from 1


def read_delimited(path: Path, *, usual: str, delimiter: str | None = None) -> FileRecords:
    """Records of a file with a header line. `usual` is the delimiter of its ending, `delimiter` the user's; without
    one, the first line decides, and a note reports it.

    Raises DataError for a line with more or fewer cells than the header, a broken quotation, or a name given twice.
    """
    text = read_text(path)
    declared = _DECLARED.match(text)
    if declared is not None:
        text = declared[2] + text[declared.end() :]  # blank, so that lines keep their numbers
    chosen = delimiter or (declared[1] if declared is not None else _found(path, text, usual))
    if chosen == usual == "\t" and delimiter is None:
        return _tsv(path, text)
    notes = (f"cells are separated by {_shown(chosen)}",) if chosen != usual and delimiter is None else ()
    return FileRecords(_table_records(path, _csv_rows(path, text, chosen)), notes)


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


def _first_rows(text: str, delimiter: str) -> list[_CsvRow]:
    """The first rows, up to a broken one."""
    rows: list[_CsvRow] = []
    with _long_cells():
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        try:
            for cells in reader:
                if cells:
                    rows.append(_CsvRow(cells, reader.line_num))
                if len(rows) > _CHECKED_ROWS:
                    break
        except csv.Error:
            pass  # reported when the whole file is read
    return rows


def _csv_rows(path: Path, text: str, delimiter: str) -> list[_CsvRow]:
    with _long_cells():
        # newline="" keeps line breaks inside quoted cells as they are.
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        try:
            return [_CsvRow(cells, reader.line_num) for cells in reader if cells]
        except csv.Error as error:
            raise DataError(f"{path}, line {reader.line_num:,}: broken CSV ({error}); correct the quotes") from error


def _tsv(path: Path, text: str) -> FileRecords:
    lines = enumerate(_LINE_END.split(text), start=1)
    literal = [_CsvRow(line.split("\t"), number) for number, line in lines if line]
    if '"' not in text:
        return FileRecords(_table_records(path, literal))
    quoted = _quoted(path, text)
    if quoted is not None and (not _is_even(literal) or len(quoted) == len(literal)):
        return FileRecords(_table_records(path, quoted), ("cells in quote marks are read as a CSV's, without them",))
    if not _is_even(literal):
        raise DataError(f"{path}, line {_uneven(literal).line:,}: {_counts(literal)}; {_MULTI_LINE_HINT}")
    num_cells = sum(cell.startswith('"') for row in literal for cell in row.cells)
    cells = "a cell" if num_cells == 1 else f"{num_cells:,} cells"
    note = f"quote marks at the start of {cells} are characters, and each line is a row, as in any TSV"
    return FileRecords(_table_records(path, literal), (note,) if num_cells else ())


def _quoted(path: Path, text: str) -> list[_CsvRow] | None:
    """The rows of a file that a CSV writer made, recognised by writing them again: the text is the same."""
    try:
        rows = _csv_rows(path, text, "\t")
    except DataError:
        return None
    ways = (csv.QUOTE_MINIMAL, csv.QUOTE_ALL)
    return rows if _is_even(rows) and any(_round_trips(rows, text, way) for way in ways) else None


def _round_trips(rows: Sequence[_CsvRow], text: str, quoting: int) -> bool:
    end = "\r\n" if "\r\n" in text else "\n"
    file = io.StringIO(newline="")
    csv.writer(file, delimiter="\t", quoting=quoting, lineterminator=end).writerows(row.cells for row in rows)  # type: ignore[arg-type]  # one of csv's constants
    return file.getvalue().removesuffix(end) == text.removesuffix(end)


def _is_even(rows: Sequence[_CsvRow]) -> bool:
    return all(len(row.cells) == len(rows[0].cells) for row in rows)


def _uneven(rows: Sequence[_CsvRow]) -> _CsvRow:
    return next(row for row in rows if len(row.cells) != len(rows[0].cells))


def _counts(rows: Sequence[_CsvRow]) -> str:
    return f"{len(_uneven(rows).cells)} cells where the first line names {len(rows[0].cells)} columns"


def _table_records(path: Path, rows: Sequence[_CsvRow]) -> list[Record]:
    if not rows:
        raise DataError(f"{path} is empty; the first line must name the columns")
    header = rows[0].cells
    twice = next((name for name in header if header.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{path}: column {twice!r} stands twice in the first line; rename one")
    if not _is_even(rows):
        raise DataError(f"{path}, line {_uneven(rows).line:,}: {_counts(rows)}; quote cells that hold the separator")
    return [dict(zip(header, row.cells, strict=True)) for row in rows[1:]]


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

"""Records from CSV and TSV files, every cell exactly the text in the file, every error with its line.

A CSV file quotes as RFC 4180 has it. A TSV file has no quoting (IANA's text/tab-separated-values): a row is a line, and
quote marks are characters. Files with tabs that a CSV writer made are recognised by what no other file has: written
again, they come out the same.
"""

from __future__ import annotations

import csv
import io
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from softprompt.data.textfiles import FileRows, Record, read_text
from softprompt.errors import DataError

_LINE_END = re.compile(r"\r\n|\r|\n")
_DECLARED = re.compile(r"sep=([^\r\n])(\r\n|\r|\n)")  # Excel's own first line
_OTHER_DELIMITERS = (";", "\t", "|", ",")  # in the order in which they are looked for
_CHECKED_ROWS = 50  # at the start of a file, to find its delimiter
_MULTI_LINE_HINT = "a row of a TSV is one line; give delimiter '\\t' to read its quote marks as those of a CSV"


class _Row(NamedTuple):
    cells: list[str]
    line: int  # its last, counted from 1


def read_delimited(path: Path, *, usual: str, delimiter: str | None = None) -> FileRows:
    """Records of a file with a header line. `usual` is the delimiter that its ending stands for, `delimiter` what the
    user says; else the first line shows it, and a note says so.

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
    return FileRows(_records(path, _csv_rows(path, text, chosen)), notes)


def _found(path: Path, text: str, usual: str) -> str:
    """The delimiter of a file: the usual one, or where the first line does not have it, another that it has.

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
        f"has {len(odd.cells)} cells where it has {width}; say what separates the cells: --delimiter"
    )


def _first_rows(text: str, delimiter: str) -> list[_Row]:
    """As many as can be read."""
    rows: list[_Row] = []
    with _long_cells():
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        try:
            for cells in reader:
                if cells:
                    rows.append(_Row(cells, reader.line_num))
                if len(rows) > _CHECKED_ROWS:
                    break
        except csv.Error:
            pass  # told when the whole file is read
    return rows


def _csv_rows(path: Path, text: str, delimiter: str) -> list[_Row]:
    with _long_cells():
        # newline="" keeps line breaks inside quoted cells as they are.
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        try:
            return [_Row(cells, reader.line_num) for cells in reader if cells]
        except csv.Error as error:
            raise DataError(f"{path}, line {reader.line_num:,}: broken CSV ({error}); correct the quotes") from error


def _tsv(path: Path, text: str) -> FileRows:
    lines = enumerate(_LINE_END.split(text), start=1)
    literal = [_Row(line.split("\t"), number) for number, line in lines if line]
    if '"' not in text:
        return FileRows(_records(path, literal))
    quoted = _quoted(path, text)
    if quoted is not None and (not _is_even(literal) or len(quoted) == len(literal)):
        return FileRows(_records(path, quoted), ("cells in quote marks are read as a CSV's, without them",))
    if not _is_even(literal):
        raise DataError(f"{path}, line {_uneven(literal).line:,}: {_counts(literal)}; {_MULTI_LINE_HINT}")
    num_cells = sum(cell.startswith('"') for row in literal for cell in row.cells)
    cells = "a cell" if num_cells == 1 else f"{num_cells:,} cells"
    note = f"quote marks at the start of {cells} are characters, and each line is a row, as in any TSV"
    return FileRows(_records(path, literal), (note,) if num_cells else ())


def _quoted(path: Path, text: str) -> list[_Row] | None:
    """The rows of a file that a CSV writer made: written again as it writes them, they are the same text."""
    try:
        rows = _csv_rows(path, text, "\t")
    except DataError:
        return None
    ways = (csv.QUOTE_MINIMAL, csv.QUOTE_ALL)
    return rows if _is_even(rows) and any(_is_written(rows, text, way) for way in ways) else None


def _is_written(rows: Sequence[_Row], text: str, quoting: int) -> bool:
    end = "\r\n" if "\r\n" in text else "\n"
    file = io.StringIO(newline="")
    csv.writer(file, delimiter="\t", quoting=quoting, lineterminator=end).writerows(row.cells for row in rows)  # type: ignore[arg-type]  # one of csv's constants
    return file.getvalue().removesuffix(end) == text.removesuffix(end)


def _is_even(rows: Sequence[_Row]) -> bool:
    return all(len(row.cells) == len(rows[0].cells) for row in rows)


def _uneven(rows: Sequence[_Row]) -> _Row:
    return next(row for row in rows if len(row.cells) != len(rows[0].cells))


def _counts(rows: Sequence[_Row]) -> str:
    return f"{len(_uneven(rows).cells)} cells where the first line names {len(rows[0].cells)} columns"


def _records(path: Path, rows: Sequence[_Row]) -> list[Record]:
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
    """The csv module refuses cells above 128 KiB unless told otherwise."""
    limit = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        yield
    finally:
        csv.field_size_limit(limit)

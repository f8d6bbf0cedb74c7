"""Records from text files, every cell exactly the text in the file, every error with its line."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from softprompt.errors import DataError
from softprompt.turns import breathe

Record = dict[str, Any]  # Any: JSON and Parquet cells are checked when they are asked for


def read_text(path: Path) -> str:
    """A file's text, UTF-8 with or without a byte order mark. Raises DataError naming the line of a wrong byte."""
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path} is not UTF-8: byte 0x{raw[error.start]:02x} in line {line:,} "
            f"(byte {error.start:,} of the file); save it as UTF-8"
        ) from error


def read_lines(path: Path) -> list[Record]:
    """One record {"text": line} per line. Lines end at a newline alone, not at the other marks Unicode has."""
    text = read_text(path).replace("\r\n", "\n")
    return [{"text": line} for line in text.removesuffix("\n").split("\n")] if text else []


def read_delimited(path: Path, *, delimiter: str) -> list[Record]:
    """Records of a CSV or TSV file with a header line, every cell a string.

    Raises DataError for a line with more or fewer cells than the header, a broken quotation, or a name given twice.
    """
    with _long_cells():
        # newline="" keeps line breaks inside quoted cells as they are.
        reader = csv.reader(io.StringIO(read_text(path), newline=""), delimiter=delimiter, strict=True)
        try:
            lines = [(cells, reader.line_num) for cells in reader if cells]
        except csv.Error as error:
            raise DataError(f"{path}, line {reader.line_num:,}: broken CSV ({error}); correct the quotes") from error
    if not lines:
        raise DataError(f"{path} is empty; the first line must name the columns")
    header = _checked_header(path, lines[0][0])
    return [_record(path, header, cells, line) for cells, line in lines[1:]]


def read_json(path: Path) -> list[Record]:
    """Records of a JSON list of objects, or of JSON lines; a string in an object's place is a record {"text": string}.

    Raises DataError naming the line that is no JSON, or no object.
    """
    text = read_text(path)
    items = _json_list(path, text) if text.lstrip().startswith("[") else _json_lines(path, text)
    return [_object(path, place, item) for place, item in items]


@contextmanager
def _long_cells() -> Iterator[None]:
    """The csv module refuses cells above 128 KiB unless told otherwise."""
    limit = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _checked_header(path: Path, header: list[str]) -> list[str]:
    twice = next((name for name in header if header.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{path}: column {twice!r} stands twice in the first line; rename one")
    return header


def _record(path: Path, header: list[str], cells: list[str], line: int) -> Record:
    if len(cells) != len(header):
        raise DataError(
            f"{path}, line {line:,}: {len(cells)} cells where the first line names {len(header)} columns; "
            "quote cells that hold the separator"
        )
    return dict(zip(header, cells, strict=True))


def _json_list(path: Path, text: str) -> list[tuple[str, Any]]:
    try:
        items = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise _broken_json(path, error, getattr(error, "lineno", 1)) from error
    return [(f"item {number:,}", item) for number, item in enumerate(items, start=1)]


def _json_lines(path: Path, text: str) -> list[tuple[str, Any]]:
    items = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        breathe()
        try:
            items.append((f"line {number:,}", json.loads(line)))
        except (json.JSONDecodeError, RecursionError) as error:
            raise _broken_json(path, error, number) from error
    return items


def _broken_json(path: Path, error: Exception, line: int) -> DataError:
    reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
    return DataError(f"{path}, line {line:,} is not JSON ({reason}); give one object per line, or a list of objects")


def _object(path: Path, place: str, item: Any) -> Record:
    if isinstance(item, str):
        return {"text": item}
    if not isinstance(item, dict):
        raise DataError(f"{path}, {place} is a {type(item).__name__}; give objects with named columns")
    return item

"""Records of a file one after the other, and how many there are, in memory that does not grow with the file.

What is read is what `read` reads, and refused alike, except that a file is checked to its end before its first record
is used. Folders, Hub data sets, lists of JSON and TSV files with quote marks are read whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple

from softprompt.config import DataConfig
from softprompt.data.read import DELIMITERS, check_file, given_delimiter, read_table
from softprompt.data.textfiles import (
    CsvRow,
    Delimiter,
    Record,
    choose_delimiter,
    csv_rows,
    iter_json_records,
    literal_rows,
    read_text,
    refuse_web_page,
    table_header,
    table_records,
    text_encoding,
    without_declaration,
)
from softprompt.errors import DataError

_HEAD_CHARACTERS = 2**20  # of a file, in which its delimiter is looked for
_PARQUET_ROWS = 1_024  # read at a time
_UTF8_MARK = b"\xef\xbb\xbf"


class Layout(NamedTuple):
    """How a file of text was written, for one that is to look like it."""

    delimiter: str = ","
    has_mark: bool = False  # a byte order mark, which Excel needs to recognise UTF-8


@dataclass(frozen=True)
class RecordStream:
    """The records of a source, which can be read again and again."""

    source: str
    columns: tuple[str, ...]  # in the order in which they first appear
    num_rows: int
    digest: str  # sha256 of the file
    open: Callable[[], Iterator[Record]]
    layout: Layout = Layout()
    arrow_schema: Any = None  # Any: pyarrow's, which has no types; of a Parquet file
    notes: tuple[str, ...] = ()  # for the user, on how it was read

    def records(self, first: int = 0, rows: int | None = None) -> Iterator[Record]:
        """The records from number `first` on, up to number `rows`."""
        return islice(self.open(), first, rows)


def open_stream(config: DataConfig, *, offline: bool = False) -> RecordStream:
    """The records that the settings name. Reads them once, to count and to check them.

    Raises DataError where the source is missing or broken anywhere, ConfigError for a delimiter that does not apply.
    """
    path = Path(config.data).expanduser()
    if not path.is_file():
        return _in_memory(config, offline)
    check_file(path, config)
    ending = path.suffix.lower()
    if ending == ".parquet":
        return _parquet(path)
    if ending in DELIMITERS:
        return _delimited(path, DELIMITERS[ending], config, offline)
    if ending in (".txt", ".text"):
        return _scanned(path, lambda: ({"text": line} for line in _plain_lines(path)))
    if _head(path).lstrip().startswith("["):
        return _in_memory(config, offline)
    return _scanned(path, lambda: iter_json_records(path, _lines(path, "\n")))


def _in_memory(config: DataConfig, offline: bool) -> RecordStream:
    table = read_table(config, offline=offline)
    digest = hashlib.sha256()
    for record in table.records:
        digest.update(json.dumps(record, default=str, sort_keys=True).encode("utf-8", "surrogatepass"))
    records = [dict(record) for record in table.records]
    return RecordStream(
        table.source, table.columns, len(records), digest.hexdigest(), lambda: iter(records), notes=table.notes
    )


def _scanned(
    path: Path, opened: Callable[[], Iterator[Record]], columns: Sequence[str] = (), layout: Layout | None = None,
    notes: tuple[str, ...] = (),
) -> RecordStream:  # fmt: skip
    names, count = dict.fromkeys(columns), 0
    for count, record in enumerate(opened(), start=1):  # noqa: B007  # counted
        names.update(dict.fromkeys(record))
    return RecordStream(str(path), tuple(names), count, _digest(path), opened, layout or Layout(), None, notes)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _delimited(path: Path, usual: str, config: DataConfig, offline: bool) -> RecordStream:
    found = choose_delimiter(path, _head(path), usual=usual, delimiter=given_delimiter(config))
    if found.is_literal and any('"' in line for line in _lines(path, "")):
        return _in_memory(config, offline)
    header = table_header(path, _rows(path, found))
    with open(path, "rb") as file:
        has_mark = file.read(3) == _UTF8_MARK or text_encoding(path) == "utf-16"
    layout = Layout(found.mark if usual == "," else ",", has_mark)
    return _scanned(path, lambda: table_records(path, _rows(path, found)), header, layout, found.notes)


def _rows(path: Path, found: Delimiter) -> Iterator[CsvRow]:
    lines = _undeclared(_lines(path, ""))
    if found.is_literal:
        return literal_rows(line.rstrip("\r\n") for line in lines)
    return csv_rows(path, lines, found.mark)


def _undeclared(lines: Iterator[str]) -> Iterator[str]:
    yield from (without_declaration(line) for line in islice(lines, 1))
    yield from lines


def _plain_lines(path: Path) -> Iterator[str]:
    return (line.removesuffix("\n").removesuffix("\r") if line[-1] == "\n" else line for line in _lines(path, "\n"))


def _head(path: Path) -> str:
    with _decoded(path, "") as file:
        text = file.read(_HEAD_CHARACTERS)
    refuse_web_page(path, text)
    return text


def _lines(path: Path, newline: str) -> Iterator[str]:
    """The lines with their ends, which are "\n" alone, or with newline "" any of the three."""
    with _decoded(path, newline) as file:
        for line in file:
            if "\0" in line:
                read_text(path)  # says where
            yield line


@contextmanager
def _decoded(path: Path, newline: str) -> Iterator[IO[str]]:
    try:
        with open(path, encoding=text_encoding(path), newline=newline) as file:
            yield file
    except UnicodeDecodeError:
        read_text(path)  # says where
        raise


def _parquet(path: Path) -> RecordStream:
    with parquet_errors(path):
        from pyarrow import parquet

        with parquet.ParquetFile(path) as file:
            schema, num_rows = file.schema_arrow, file.metadata.num_rows
        for _ in _batches(path):  # checked to its end, as the other formats are
            pass
    columns = tuple(schema.names)
    return RecordStream(
        str(path), columns, num_rows, _digest(path), lambda: _parquet_records(path), arrow_schema=schema
    )


def _batches(path: Path) -> Iterator[Any]:  # Any: pyarrow's record batches
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        yield from file.iter_batches(_PARQUET_ROWS)


def _parquet_records(path: Path) -> Iterator[Record]:
    with parquet_errors(path):
        for batch in _batches(path):
            yield from _as_records(batch)


def _as_records(batch: Any) -> Iterable[Record]:  # Any: as above
    columns = {name: _cells(column) for name, column in zip(batch.schema.names, batch.columns, strict=True)}
    return [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]


def _cells(column: Any) -> list[Any]:  # Any: as above
    """Python's values; of a type that Python has not, such as nanoseconds, its text."""
    try:
        found: list[Any] = column.to_pylist()
    except ValueError:
        found = column.cast("string").to_pylist()
    return found


@contextmanager
def parquet_errors(path: Path) -> Iterator[None]:
    """Errors of pyarrow as one sentence."""
    from pyarrow import ArrowException

    try:
        yield
    except (ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path} cannot be read: {reason[:300] or type(error).__name__}") from error

"""Records with further columns as the bytes of a file: CSV, JSON lines or Parquet, by its ending.

A file is written in parts, each of which is whole, and then joined: CSV and JSON lines by appending, Parquet by reading
the parts' rows again, since its index stands at its end.
"""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from softprompt.data.stream import Layout, RecordStream
from softprompt.errors import ConfigError
from softprompt.types import finite

CellKind = Literal["text", "number", "count", "flag", "texts", "numbers"]
_ROW_GROUP = 65_536  # rows of a Parquet file that a reader decompresses together, at most
_ROW_GROUP_BYTES = 64 * 2**20
_INFERRED_ROWS = 4_096  # whose types are inferred at a time


class AddedColumn(NamedTuple):
    """A column that is added behind those of the records."""

    name: str
    kind: CellKind


class TableFormat:
    """What a file of one ending is written by."""

    suffix: str

    def part(
        self, records: Sequence[Mapping[str, Any]], added: Sequence[Sequence[Any]]
    ) -> bytes:  # Any: cells of all kinds
        """Some rows: each record with its cells of the added columns. The first part has a header if there is one."""
        raise NotImplementedError

    def join(self, parts: Iterable[Path], target: Path) -> None:
        """Write the parts into one file."""
        with open(target, "wb") as file:
            file.write(self.header())
            for part in parts:
                with open(part, "rb") as own:
                    shutil.copyfileobj(own, file)

    def header(self) -> bytes:
        return b""


ENDINGS = (".csv", ".jsonl", ".ndjson", ".parquet")


def table_format(path: Path, stream: RecordStream, added: Sequence[AddedColumn]) -> TableFormat:
    """The format of the path's ending. Raises ConfigError for another ending."""
    ending = path.suffix.lower()
    check_ending(path)
    if ending == ".csv":
        return CsvFormat(stream.columns, added, stream.layout)
    return JsonLinesFormat(added) if ending != ".parquet" else ParquetFormat(stream, added)


def check_ending(path: Path) -> None:
    """Raises ConfigError for a file whose ending says no format that can be written."""
    if path.suffix.lower() not in ENDINGS:
        raise ConfigError(f"{path}: ending {path.suffix!r} is not known; answers can be {', '.join(ENDINGS)}")


class CsvFormat(TableFormat):
    """RFC 4180, separated as the file that was read, in UTF-8, with a byte order mark if that one had one."""

    suffix = ".csv"

    def __init__(self, columns: Sequence[str], added: Sequence[AddedColumn], layout: Layout) -> None:
        self._columns, self._layout = columns, layout
        self._names = [*columns, *(column.name for column in added)]

    def header(self) -> bytes:
        mark = "\ufeff" if self._layout.has_mark else ""
        return (mark + self._written([self._names])).encode()

    def part(self, records: Sequence[Mapping[str, Any]], added: Sequence[Sequence[Any]]) -> bytes:
        rows = ([*map(record.get, self._columns), *cells] for record, cells in zip(records, added, strict=True))
        return self._written([[_csv_cell(cell) for cell in row] for row in rows]).encode("utf-8", "replace")

    def _written(self, rows: Sequence[Sequence[str]]) -> str:
        mark = self._layout.delimiter
        return "".join(mark.join(_quoted(cell, mark) for cell in row) + "\n" for row in rows)


def _quoted(cell: str, delimiter: str) -> str:
    """By RFC 4180. Python's writer leaves a carriage return bare, which its reader takes for the end of a row."""
    is_special = any(mark in cell for mark in (delimiter, '"', "\r", "\n")) or cell.startswith("sep=")
    return '"' + cell.replace('"', '""') + '"' if is_special else cell


def _csv_cell(cell: Any) -> str:  # Any: whatever JSON or Parquet holds
    if cell is None:
        return ""
    if isinstance(cell, str):
        return cell
    if isinstance(cell, bool):
        return str(cell).lower()
    return json.dumps(finite(cell), ensure_ascii=False, default=_json_value).strip('"')


def _json_value(cell: object) -> str:
    """Of what JSON has no type for: a time in ISO 8601, bytes in base64, anything else as Python writes it."""
    if isinstance(cell, bytes):
        return base64.b64encode(cell).decode("ascii")
    written = getattr(cell, "isoformat", None)
    return str(cell if written is None else written())


class JsonLinesFormat(TableFormat):
    """One object per line, in UTF-8; a record keeps the keys that it has."""

    suffix = ".jsonl"

    def __init__(self, added: Sequence[AddedColumn]) -> None:
        self._names = [column.name for column in added]

    def part(self, records: Sequence[Mapping[str, Any]], added: Sequence[Sequence[Any]]) -> bytes:
        rows = ({**record, **dict(zip(self._names, cells, strict=True))} for record, cells in _paired(records, added))
        return "".join(f"{_json_text(row)}\n" for row in rows).encode()


def _json_text(value: Any) -> str:  # Any: whatever JSON or Parquet holds
    text = json.dumps(finite(value), ensure_ascii=False, allow_nan=False, default=_json_value)
    return text if _is_unicode(text) else json.dumps(finite(value), allow_nan=False, default=_json_value)


def _is_unicode(text: str) -> bool:
    """False for half of a surrogate pair, which JSON can write and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _paired(
    records: Sequence[Mapping[str, Any]], added: Sequence[Sequence[Any]]
) -> Iterator[tuple[Mapping[str, Any], Sequence[Any]]]:
    return zip(records, added, strict=True)


class ParquetFormat(TableFormat):
    """The types of a Parquet file that was read are kept; those of JSON are inferred, where a column has one type."""

    suffix = ".parquet"

    def __init__(self, stream: RecordStream, added: Sequence[AddedColumn]) -> None:
        import pyarrow as pa

        own = stream.arrow_schema if stream.arrow_schema is not None else _inferred(stream)
        self._texts = [] if stream.arrow_schema is not None else [f.name for f in own if f.type == pa.string()]
        self._names = [column.name for column in added]
        self._schema = pa.schema([*own, *(pa.field(column.name, _arrow_type(column.kind)) for column in added)])

    def part(self, records: Sequence[Mapping[str, Any]], added: Sequence[Sequence[Any]]) -> bytes:
        import pyarrow as pa
        from pyarrow import parquet

        rows = [
            {**self._as_typed(record), **dict(zip(self._names, cells, strict=True))}
            for record, cells in _paired(records, added)
        ]
        sink = pa.BufferOutputStream()
        parquet.write_table(pa.Table.from_pylist(rows, schema=self._schema), sink)
        written: bytes = sink.getvalue().to_pybytes()
        return written

    def join(self, parts: Iterable[Path], target: Path) -> None:
        import pyarrow as pa
        from pyarrow import parquet

        with parquet.ParquetWriter(target, self._schema) as writer:
            tables: list[Any] = []  # Any: pyarrow's
            for part in parts:
                tables.append(parquet.read_table(part, schema=self._schema))
                if sum(map(len, tables)) >= _ROW_GROUP or sum(own.nbytes for own in tables) >= _ROW_GROUP_BYTES:
                    writer.write_table(pa.concat_tables(tables), row_group_size=_ROW_GROUP)
                    tables = []
            if tables:
                writer.write_table(pa.concat_tables(tables), row_group_size=_ROW_GROUP)

    def _as_typed(self, record: Mapping[str, Any]) -> Mapping[str, Any]:
        """With text in the place of values of a column that has several types."""
        return {**record, **{name: _as_text(record.get(name)) for name in self._texts}}


def _as_text(cell: Any) -> str | None:  # Any: whatever JSON holds
    if cell is None:
        return None
    return cell.encode("utf-8", "replace").decode() if isinstance(cell, str) else _json_text(cell)


def _arrow_type(kind: CellKind) -> Any:  # Any: pyarrow's types
    import pyarrow as pa

    plain = {"text": pa.string(), "number": pa.float64(), "count": pa.int64(), "flag": pa.bool_()}
    return plain[kind] if kind in plain else pa.list_(pa.string() if kind == "texts" else pa.float32())


def _inferred(stream: RecordStream) -> Any:  # Any: pyarrow's schema
    """One type for each column; text where its cells have several types, or none."""
    import pyarrow as pa

    found: dict[str, Any] = dict.fromkeys(stream.columns, pa.null())
    block: list[Mapping[str, Any]] = []
    for record in stream.records():
        block.append(record)
        if len(block) == _INFERRED_ROWS:
            found, block = _unified(found, block), []
    found = _unified(found, block)
    return pa.schema([(name, pa.string() if pa.types.is_null(kind) else kind) for name, kind in found.items()])


def _unified(known: Mapping[str, Any], block: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    import pyarrow as pa

    found: dict[str, Any] = {}
    for name, kind in known.items():
        try:
            own = pa.array([record.get(name) for record in block]).type
            both = [pa.schema([(name, each)]) for each in (kind, own)]
            found[name] = pa.unify_schemas(both, promote_options="permissive").field(name).type
        except (pa.ArrowException, OverflowError, UnicodeEncodeError):
            found[name] = pa.string()
    return found

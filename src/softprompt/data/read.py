"""Rows from a file, a folder, the Hub or Python objects.

Text formats (CSV, TSV, JSON, JSON lines, plain text) are read here, not through the `datasets` library: its readers
guess types, so that a column of "NA", "007" or "2020-01-01 00:00:00" is no longer the text in the file, and they cannot
name the line that is broken. Parquet, folders saved by `datasets` and Hub sets carry their own types and go through it.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Any

from softprompt.config import DataConfig
from softprompt.data.columns import Table, rows_of
from softprompt.data.records import TEXT, records_of
from softprompt.data.rows import Rows
from softprompt.data.sources import read_table
from softprompt.data.textfiles import Record
from softprompt.errors import DataError
from softprompt.types import InputForm


def read_rows(config: DataConfig, *, seed: int = 0, offline: bool = False, form: InputForm | None = None) -> Rows:
    """The rows that the settings ask for: the first `rows`, after a shuffle by `seed` if asked; no part held out.

    Where the settings name no columns, the rows are written in `form`, a prompt's say, else as the columns' names
    suggest; `notes` of the rows say what was guessed and which columns are not used.
    Raises DataError where the source is missing, broken, empty or lacks a column; ConfigError for settings that
    contradict each other.
    """
    rows = read_all_rows(config, offline=offline, form=form)
    return rows.take(row_order(len(rows), config, seed)[: config.rows])


def read_all_rows(config: DataConfig, *, offline: bool = False, form: InputForm | None = None) -> Rows:
    """Every row of the source, in its order. Raises as `read_rows` does."""
    return rows_of(read_table(config, offline=offline), config, form)


def row_order(num_rows: int, config: DataConfig, seed: int) -> list[int]:
    """The order in which rows are taken."""
    order = list(range(num_rows))
    if config.shuffle:
        random.Random(f"rows:{seed}").shuffle(order)
    return order


def rows_from_texts(texts: Iterable[str], *, source: str = "texts") -> Rows:
    """Rows of plain text. Raises DataError where there are none, and for one text in the place of several."""
    records = records_of(texts)
    for number, record in enumerate(records, start=1):
        if list(record) != [TEXT]:
            raise DataError(f"item {number:,} of {source} is no text but a row of columns; use rows_from_records")
    return rows_of(Table(source, (TEXT,), records), DataConfig(data=source, text_column=TEXT))


def rows_from_records(
    records: Iterable[Any],  # Any: rows and cells are checked
    *,
    source: str = "records",
    text_column: str | None = None,
    label_column: str | None = None,
    template: str | None = None,
    completion: str | None = None,
    messages_column: str | None = None,
) -> Rows:
    """Rows from dictionaries, or from what holds some: a `datasets.Dataset`, a DataFrame. Columns as in DataConfig.

    Raises as `read_rows` does.
    """
    config = DataConfig(
        data=source,
        text_column=text_column,
        label_column=label_column,
        template=template,
        completion=completion,
        messages_column=messages_column,
    )
    return _rows(records_of(records), config)


def as_rows(data: Rows | Iterable[Any], form: InputForm | None = None) -> Rows:  # Any: as above
    """Rows as they are; else of texts, dictionaries, a DataFrame or a data set, in `form` or as their columns suggest.

    Raises DataError for what is no set of rows: one text, a dictionary, numbers.
    """
    return data if isinstance(data, Rows) else _rows(records_of(data), DataConfig(data="the data"), form)


def _rows(records: Sequence[Record], config: DataConfig, form: InputForm | None = None) -> Rows:
    columns = dict.fromkeys(name for record in records for name in record)
    return rows_of(Table(config.data, tuple(columns), records), config, form)

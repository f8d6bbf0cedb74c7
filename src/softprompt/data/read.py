"""Rows from a file, a folder, the Hub or Python objects.

Text formats (CSV, TSV, JSON, JSON lines, plain text) are read here, not through the `datasets` library: its readers
guess types, so that a column of "NA", "007" or "2020-01-01 00:00:00" is no longer the text in the file, and they cannot
name the line that is broken. Parquet, folders saved by `datasets` and Hub sets carry their own types and go through it.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from typing import Any

from softprompt.config import DataConfig
from softprompt.data.columns import Table, rows_of
from softprompt.data.rows import Rows
from softprompt.data.sources import read_table
from softprompt.errors import ConfigError


def read_rows(config: DataConfig, *, seed: int = 0, offline: bool = False) -> Rows:
    """The rows that the settings ask for: the first `rows`, after a shuffle by `seed` if asked; no part held out.

    Raises DataError where the source is missing, broken, empty or lacks a column; ConfigError for settings that
    contradict each other.
    """
    rows = read_all_rows(config, offline=offline)
    return rows.take(row_order(len(rows), config, seed)[: config.rows])


def read_all_rows(config: DataConfig, *, offline: bool = False) -> Rows:
    """Every row of the source, in its order. Raises as `read_rows` does."""
    return rows_of(read_table(config, offline=offline), config)


def row_order(num_rows: int, config: DataConfig, seed: int) -> list[int]:
    """The order in which rows are taken. Raises ConfigError for a number of rows below 1."""
    if config.rows is not None and config.rows < 1:
        raise ConfigError(f"rows is {config.rows}; it must be at least 1")
    order = list(range(num_rows))
    if config.shuffle:
        random.Random(f"rows:{seed}").shuffle(order)
    return order


def rows_from_texts(texts: Iterable[str], *, source: str = "texts") -> Rows:
    """Rows of plain text. Raises DataError where there are none."""
    return rows_from_records(({"text": text} for text in texts), source=source, text_column="text")


def rows_from_records(
    records: Iterable[Mapping[str, Any]],  # Any: cells are checked when they are asked for
    *,
    source: str = "records",
    text_column: str | None = None,
    template: str | None = None,
    completion: str | None = None,
    messages_column: str | None = None,
) -> Rows:
    """Rows from dictionaries (or anything that yields them, a `datasets.Dataset` too). Columns as in DataConfig.

    Raises as `read_rows` does.
    """
    config = DataConfig(
        data=source,
        text_column=text_column,
        template=template,
        completion=completion,
        messages_column=messages_column,
    )
    kept = tuple(records)
    columns = dict.fromkeys(name for record in kept for name in record)
    return rows_of(Table(source, tuple(columns), kept), config)

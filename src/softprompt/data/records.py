"""Records from Python objects: texts, dictionaries, DataFrames, data sets of the `datasets` library.

Known by what they can do, so that neither pandas nor any other library is imported here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from softprompt.data.textfiles import Record
from softprompt.errors import DataError, shortened

TEXT = "text"  # the column of texts that have none


def records_of(data: Iterable[Any]) -> list[Record]:  # Any: checked here
    """One record per row; a text in a row's place is a record {"text": text}.

    Raises DataError, with what to give instead, for what is no set of rows.
    """
    _refuse_no_rows(data)
    return [_record(item, number) for number, item in enumerate(_items(data), start=1)]


def _refuse_no_rows(data: object) -> None:
    if isinstance(data, (str, bytes)):
        raise DataError(
            f"the data is one text, {shortened(data)}; give a list of texts, or read a file with "
            "read_rows(DataConfig(data=...))"
        )
    if isinstance(data, Mapping):
        kind, first = type(data).__name__, shortened(next(iter(data), "train"))
        hint = f"one of its splits, [{first}] say" if kind.endswith("DatasetDict") else "a list of them, one per row"
        raise DataError(f"the data is a {kind} with {first}; give {hint}")
    if not isinstance(data, Iterable) and not hasattr(data, "__getitem__"):
        raise DataError(f"the data is a {type(data).__name__}; give texts, dictionaries, a DataFrame or a data set")


def _items(data: Any) -> Any:  # Any: a library's object, and what it gives
    """The rows of a table, where iterating over it would give its columns; else its items."""
    if hasattr(data, "to_pylist"):  # pyarrow
        return data.to_pylist()
    if hasattr(data, "iter_rows") and hasattr(data, "columns"):  # polars
        return data.iter_rows(named=True)
    if hasattr(data, "to_dict") and hasattr(data, "columns"):  # pandas
        plain = data.astype(object)
        return plain.where(plain.notna(), None).to_dict("records")
    return data


def _record(item: object, number: int) -> Record:
    if isinstance(item, str):
        return {TEXT: item}
    if isinstance(item, Mapping):
        return {str(name): cell for name, cell in item.items()}
    raise DataError(
        f"item {number:,} of the data is a {type(item).__name__}, {shortened(item)}; give texts, or dictionaries with "
        "named columns"
    )

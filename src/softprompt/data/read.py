"""Rows from a file, a folder, the Hub or Python objects.

Text formats (CSV, TSV, JSON, JSON lines, plain text) are read in `textfiles`, not by the `datasets` library: its
readers guess types, so that a column of "NA", "007" or "2020-01-01 00:00:00" is no longer the text in the file, and
they cannot name the line that is broken. Parquet, folders saved by `datasets` and Hub data sets carry their own types
and are read by it: local files leave no cache behind; a Hub data set stays in the library's cache, for offline use.
DataFrames and data sets in memory are recognised by their methods, so neither pandas nor polars is imported.
"""

from __future__ import annotations

import random
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from softprompt.config import DataConfig, TaskChoice
from softprompt.data.columns import SourceTable, rows_of
from softprompt.data.rows import Rows
from softprompt.data.textfiles import FileRecords, Record, read_delimited, read_json, read_lines
from softprompt.errors import ConfigError, DataError, shortened
from softprompt.guard import lfs_pointer_problem
from softprompt.settings import typed_text
from softprompt.types import InputForm


def read_rows(
    config: DataConfig, *, seed: int = 0, offline: bool = False, form: InputForm | None = None,
    task: TaskChoice = "auto",
) -> Rows:  # fmt: skip
    """The rows of the settings: the first `rows`, after a shuffle by `seed` if requested; nothing is held out.

    Where the settings name no columns, the rows have the form `form`, for example a prompt's, else the one that the
    columns' names suggest; `notes` of the rows report a guess and unused columns. `task` is `TrainConfig.task`.
    Raises DataError where the source is missing, broken, empty or lacks a column; ConfigError for settings that
    contradict each other.
    """
    rows = read_all_rows(config, offline=offline, form=form, task=task)
    return rows.select(row_order(len(rows), config, seed)[: config.rows])


def read_all_rows(
    config: DataConfig, *, offline: bool = False, form: InputForm | None = None, task: TaskChoice = "auto"
) -> Rows:
    """Every row of the source, in its order. Raises as `read_rows` does."""
    return rows_of(read_table(config, offline=offline), config, form, task)


def row_order(num_rows: int, config: DataConfig, seed: int) -> list[int]:
    """The positions of the rows in the order of use."""
    order = list(range(num_rows))
    if config.shuffle:
        random.Random(f"rows:{seed}").shuffle(order)
    return order


def rows_from_texts(texts: Iterable[str], *, source: str = "texts") -> Rows:
    """Rows of plain text. Raises DataError where there are none, and for one text instead of several."""
    records = records_of(texts)
    for number, record in enumerate(records, start=1):
        if list(record) != [TEXT]:
            raise DataError(f"item {number:,} of {source} is no text but a row of columns; use rows_from_records")
    return rows_of(SourceTable(source, (TEXT,), records), DataConfig(data=source, text_column=TEXT))


def rows_from_records(
    records: Iterable[Any],  # Any: rows and cells are checked
    *,
    source: str = "records",
    text_column: str | None = None,
    label_column: str | None = None,
    template: str | None = None,
    completion: str | None = None,
    messages_column: str | None = None,
    task: TaskChoice = "auto",
) -> Rows:
    """Rows from dictionaries, or from a container of rows: a `datasets.Dataset`, a DataFrame. Columns as in DataConfig.

    `task` is what they are for, as in TrainConfig.

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
    return _rows_of_records(records_of(records), config, task=task)


def as_rows(
    data: Rows | Iterable[Any],
    form: InputForm | None = None,
    task: TaskChoice = "auto",  # Any: as above
) -> Rows:
    """Rows unchanged; else rows of texts, dictionaries, a DataFrame or a data set, in `form` or by their columns.

    Raises DataError for anything else: one text, a dictionary, numbers.
    """
    if isinstance(data, Rows):
        return data
    return _rows_of_records(records_of(data), DataConfig(data="the data"), form, task)


def _rows_of_records(
    records: Sequence[Record], config: DataConfig, form: InputForm | None = None, task: TaskChoice = "auto"
) -> Rows:
    columns = dict.fromkeys(name for record in records for name in record)
    return rows_of(SourceTable(config.data, tuple(columns), records), config, form, task)


_DEFAULT_SPLIT = "train"


def read_parquet(path: Path) -> list[Record]:
    """Records of a Parquet file. Raises DataError where it cannot be read."""
    with _datasets_library(str(path)) as datasets, tempfile.TemporaryDirectory() as cache:
        return _stored_records(datasets.Dataset.from_parquet(str(path), cache_dir=cache, keep_in_memory=True))


def read_saved_folder(folder: Path, split: str | None) -> list[Record]:
    """Records of a folder that `save_to_disk` wrote; of its split, if it holds several.

    Raises DataError where the folder is broken or has no such split.
    """
    with _datasets_library(str(folder)) as datasets:
        saved = datasets.load_from_disk(str(folder), keep_in_memory=True)
        if isinstance(saved, datasets.DatasetDict):
            wanted = split or _DEFAULT_SPLIT
            if wanted not in saved:
                raise DataError(f"{folder} has no split {wanted!r}; it has {', '.join(map(repr, saved))}")
            saved = saved[wanted]
        return _stored_records(saved)


def read_hub_set(name: str, subset: str | None, split: str | None, *, offline: bool) -> list[Record]:
    """Records of one split of a Hub data set. Raises DataError where it cannot be loaded."""
    with _datasets_library(f"Hub data set {name!r}") as datasets, _no_network(datasets) if offline else nullcontext():
        return _stored_records(datasets.load_dataset(name, subset, split=split or _DEFAULT_SPLIT))


def _stored_records(dataset: Any) -> list[Record]:  # Any: a datasets.Dataset, which has no types
    """Cells as stored, not decoded, so that an image column next to the text needs no image library.

    Lists of classes are read by the classes' names: tags without them are numbers that mean nothing.
    """
    stored: list[Record] = dataset.with_format("arrow")[:].to_pylist()
    for column, feature in dataset.features.items():
        names = getattr(getattr(feature, "feature", None), "names", None) or ()
        for record in stored if names else ():
            record[column] = _named(record[column], names)
    return stored


def _named(cell: Any, names: Sequence[str]) -> Any:  # Any: as stored
    if not isinstance(cell, list):
        return cell
    return [names[item] if isinstance(item, int) and 0 <= item < len(names) else item for item in cell]


@contextmanager
def _no_network(datasets: Any) -> Iterator[None]:
    """Only these two settings keep both libraries off the network; `local_files_only` still sends a request first."""
    from huggingface_hub import constants

    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before


@contextmanager
def _datasets_library(what: str) -> Iterator[Any]:  # Any: the datasets module, which has no types
    """The library without progress bars and logs, its errors as one sentence."""
    import datasets

    shows_bars = not datasets.utils.are_progress_bars_disabled()
    verbosity = datasets.utils.logging.get_verbosity()
    datasets.utils.disable_progress_bars()
    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)
    try:
        yield datasets
    except DataError:
        raise
    except Exception as error:  # errors of pyarrow, fsspec and the Hub client pass through the library
        reason = " ".join(str(error.__cause__ or error).split())
        raise DataError(f"{what} cannot be read: {reason[:300] or type(error).__name__}") from error
    finally:
        datasets.utils.logging.set_verbosity(verbosity)
        if shows_bars:
            datasets.utils.enable_progress_bars()


DELIMITERS = {".csv": ",", ".tsv": "\t"}
_READERS: dict[str, Callable[[Path], list[Record]]] = {
    ".json": read_json,
    ".jsonl": read_json,
    ".ndjson": read_json,
    ".parquet": read_parquet,
    ".txt": read_lines,
    ".text": read_lines,
}
_ENDINGS = (*DELIMITERS, *_READERS)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_SAVED_BY_DATASETS = ("dataset_dict.json", "state.json")


def read_table(config: DataConfig, *, offline: bool = False) -> SourceTable:
    """Columns and records of a file, a folder or a Hub data set.

    Raises DataError where nothing is there, or it cannot be read.
    """
    path = Path(config.data).expanduser()
    if path.is_dir():
        return _read_folder(path, config)
    if path.is_file():
        return _joined(config.data, [_read_file(path, config)])
    if _HUB_ID.fullmatch(config.data) and path.suffix.lower() not in _ENDINGS:
        records = read_hub_set(config.data, config.subset, config.split, offline=offline)
        return _joined(config.data, [FileRecords(records)])
    raise DataError(f"there is no data at {config.data!r} (looked at {path.absolute()}; a Hub data set is org/name)")


def _joined(source: str, files: Sequence[FileRecords]) -> SourceTable:
    records = [record for file in files for record in file.records]
    columns = tuple(dict.fromkeys(name for record in records for name in record))
    return SourceTable(source, columns, records, tuple(note for file in files for note in file.notes))


def _read_file(path: Path, config: DataConfig) -> FileRecords:
    check_file(path, config)
    ending = path.suffix.lower()
    if ending in DELIMITERS:
        return read_delimited(path, usual=DELIMITERS[ending], delimiter=given_delimiter(config))
    return FileRecords(_READERS[ending](path))


def given_delimiter(config: DataConfig) -> str | None:
    """The delimiter in the settings, as a character."""
    return None if config.delimiter is None else typed_text(config.delimiter)


def check_file(path: Path, config: DataConfig) -> None:
    """Raises DataError for a file that is no data by its ending or is empty, ConfigError for a delimiter of no CSV."""
    ending = path.suffix.lower()
    if ending not in _ENDINGS:
        raise DataError(f"{path}: ending {path.suffix!r} is not known; data can be {', '.join(_ENDINGS)}")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is an empty file; there is nothing to learn from")
    problem = lfs_pointer_problem(path)
    if problem is not None:
        raise DataError(problem)
    if config.delimiter is not None and ending not in DELIMITERS:
        raise ConfigError(f"delimiter is {config.delimiter!r}, but {path} is no CSV or TSV file; leave it out")


def _read_folder(folder: Path, config: DataConfig) -> SourceTable:
    if any((folder / name).is_file() for name in _SAVED_BY_DATASETS):
        return _joined(config.data, [FileRecords(read_saved_folder(folder, config.split))])
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.suffix.lower() in _ENDINGS)
    if not files:
        raise DataError(f"folder {folder} holds no data; known endings are {', '.join(_ENDINGS)}")
    chosen = _files_of_split(folder, files, config.split)
    endings = sorted({path.suffix.lower() for path in chosen})
    if len(endings) > 1:
        raise DataError(f"folder {folder} holds files of several kinds ({', '.join(endings)}); name one file")
    return _joined(config.data, [_read_file(path, config) for path in chosen])


def _files_of_split(folder: Path, files: Sequence[Path], split: str | None) -> list[Path]:
    """Files whose name has the split as a word ("train-00000.parquet"); else all."""
    wanted = split or "train"
    chosen = [path for path in files if wanted in re.split(r"[^A-Za-z]+", path.stem)]
    if not chosen and split is not None:
        raise DataError(f"folder {folder} has no file for split {split!r}; it has {', '.join(p.name for p in files)}")
    return chosen or list(files)


TEXT = "text"  # the column of texts without columns


def records_of(data: Iterable[Any]) -> list[Record]:  # Any: checked here
    """One record per row; a text instead of a row is a record {"text": text}.

    Raises DataError, with what to give instead, for anything else than rows.
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
        hint = f"one of its splits, like [{first}]" if kind.endswith("DatasetDict") else "a list of them, one per row"
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

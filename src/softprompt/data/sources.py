"""Which reader a source needs: by file ending, by what a folder holds, or a Hub id."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from softprompt.config import DataConfig
from softprompt.data.columns import Table
from softprompt.data.delimited import read_delimited
from softprompt.data.hub import read_hub_set, read_parquet, read_saved_folder
from softprompt.data.textfiles import FileRows, Record, read_json, read_lines
from softprompt.errors import ConfigError, DataError
from softprompt.guard import lfs_pointer_problem
from softprompt.settings import typed_text

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_READERS: dict[str, Callable[[Path], list[Record]]] = {
    ".json": read_json,
    ".jsonl": read_json,
    ".ndjson": read_json,
    ".parquet": read_parquet,
    ".txt": read_lines,
    ".text": read_lines,
}
_ENDINGS = (*_DELIMITERS, *_READERS)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_SAVED_BY_DATASETS = ("dataset_dict.json", "state.json")


def read_table(config: DataConfig, *, offline: bool = False) -> Table:
    """Columns and records of a file, a folder or a Hub data set.

    Raises DataError where there is nothing at that place, or it cannot be read.
    """
    path = Path(config.data).expanduser()
    if path.is_dir():
        return _read_folder(path, config)
    if path.is_file():
        return _table(config.data, [_read_file(path, config)])
    if _HUB_ID.fullmatch(config.data) and path.suffix.lower() not in _ENDINGS:
        records = read_hub_set(config.data, config.subset, config.split, offline=offline)
        return _table(config.data, [FileRows(records)])
    raise DataError(f"there is no data at {config.data!r} (looked at {path.absolute()}; a Hub data set is org/name)")


def _table(source: str, files: Sequence[FileRows]) -> Table:
    records = [record for file in files for record in file.records]
    columns = tuple(dict.fromkeys(name for record in records for name in record))
    return Table(source, columns, records, tuple(note for file in files for note in file.notes))


def _read_file(path: Path, config: DataConfig) -> FileRows:
    ending = path.suffix.lower()
    if ending not in _ENDINGS:
        raise DataError(f"{path}: ending {path.suffix!r} is not known; data can be {', '.join(_ENDINGS)}")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is an empty file; there is nothing to learn from")
    problem = lfs_pointer_problem(path)
    if problem is not None:
        raise DataError(problem)
    if ending in _DELIMITERS:
        given = None if config.delimiter is None else typed_text(config.delimiter)
        return read_delimited(path, usual=_DELIMITERS[ending], delimiter=given)
    if config.delimiter is not None:
        raise ConfigError(f"delimiter is {config.delimiter!r}, but {path} is no CSV or TSV file; leave it out")
    return FileRows(_READERS[ending](path))


def _read_folder(folder: Path, config: DataConfig) -> Table:
    if any((folder / name).is_file() for name in _SAVED_BY_DATASETS):
        return _table(config.data, [FileRows(read_saved_folder(folder, config.split))])
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.suffix.lower() in _ENDINGS)
    if not files:
        raise DataError(f"folder {folder} holds no data; known endings are {', '.join(_ENDINGS)}")
    chosen = _files_of_split(folder, files, config.split)
    endings = sorted({path.suffix.lower() for path in chosen})
    if len(endings) > 1:
        raise DataError(f"folder {folder} holds files of several kinds ({', '.join(endings)}); name one file")
    return _table(config.data, [_read_file(path, config) for path in chosen])


def _files_of_split(folder: Path, files: Sequence[Path], split: str | None) -> list[Path]:
    """Files whose name has the split as a word ("train-00000.parquet"); without a split asked for or named, all."""
    wanted = split or "train"
    chosen = [path for path in files if wanted in re.split(r"[^A-Za-z]+", path.stem)]
    if not chosen and split is not None:
        raise DataError(f"folder {folder} has no file for split {split!r}; it has {', '.join(p.name for p in files)}")
    return chosen or list(files)

"""A file of answers that is being written: in parts beside it, each whole, so that a killed job loses one chunk.

`answers.csv.partial/` has `job.json`, which says what is answered with what, and for each chunk of rows a part, named
by the number of its first row and of its rows, and its counts. At the end the parts become `answers.csv` in one rename.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from softprompt.data.stream import RecordStream
from softprompt.data.write import AddedColumn, TableFormat, check_ending, table_format
from softprompt.errors import ConfigError, ExistsError, StorageError
from softprompt.evaluation import Prediction
from softprompt.evaluation.predict import Chunk
from softprompt.storage.atomic import disk_errors, sync_folder, write_file, write_files

_JOB, _COUNTS = "job.json", ".counts"
_PART = re.compile(r"(\d{12})-(\d+)\.\w+")
_FIRST_PREFIX = "predicted_"  # of a column that the rows have already


@dataclass
class AnswerCounts:
    """How many rows have which answers."""

    rows: int = 0
    unsure: int = 0
    truncated: int = 0
    errors: int = 0
    labels: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, predictions: Sequence[Prediction]) -> AnswerCounts:
        return cls(
            rows=len(predictions),
            unsure=sum(bool(item.is_unsure) for item in predictions),
            truncated=sum(item.is_truncated for item in predictions),
            errors=sum(item.error is not None for item in predictions),
            labels=Counter(item.label for item in predictions if isinstance(item.label, str)),
        )

    def __add__(self, other: AnswerCounts) -> AnswerCounts:
        names = [item.name for item in fields(self)]
        return AnswerCounts(*(getattr(self, name) + getattr(other, name) for name in names))

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "labels": dict(self.labels.most_common())}


class _Part(NamedTuple):
    first: int
    rows: int
    path: Path

    @property
    def end(self) -> int:
        return self.first + self.rows


class PredictionFile:
    """The answers of one job. `num_done` rows have theirs."""

    def __init__(
        self, path: Path, stream: RecordStream, columns: Sequence[AddedColumn], job: Mapping[str, Any]
    ) -> None:
        """`job` is JSON: what the answers depend on, by names that a user knows."""
        self.path, self._folder = path, partial_folder(path)
        self.columns = free_names(columns, stream.columns)
        self._format: TableFormat = table_format(path, stream, self.columns)
        self._job = {**job, "rows": stream.num_rows, "columns": [list(column) for column in self.columns]}
        self._parts: list[_Part] = []
        self.counts = AnswerCounts()

    @property
    def num_done(self) -> int:
        return self._parts[-1].end if self._parts else 0

    def begin(self) -> None:
        """Start from the first row; answers of an earlier job that did not end are deleted."""
        with disk_errors(self.path):
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder.mkdir()
            sync_folder(self._folder.parent)
        write_file(self._folder / _JOB, json.dumps(self._job, indent=2).encode())

    def resume(self) -> None:
        """Go on behind the parts that are there, or begin. Raises ConfigError where they are another job's."""
        if not (self._folder / _JOB).is_file():
            return self.begin()
        known = _read_object(self._folder / _JOB)
        changed = [name for name in self._job if known.get(name) != self._job[name]]
        if changed:
            raise ConfigError(
                f"the answers in {self._folder} are of another job: {', '.join(changed)} changed since; "
                "--overwrite without --resume begins again"
            )
        self._parts = _whole_parts(self._folder)
        for part in self._parts:
            self.counts += AnswerCounts(**_read_counts(part.path.with_suffix(_COUNTS)))
        return None

    def add(self, chunk: Chunk, cells: Sequence[Sequence[Any]]) -> None:  # Any: a cell of each column's kind
        """Write the next rows, durably."""
        first, counts = self.num_done, AnswerCounts.of(chunk.predictions)
        name = f"{first:012}-{counts.rows}"
        files = {
            f"{name}{_COUNTS}": json.dumps(counts.to_json()).encode(),
            f"{name}{self._format.suffix}": self._format.part(chunk.records, cells),
        }
        write_files(self._folder, files)
        self._parts.append(_Part(first, counts.rows, self._folder / f"{name}{self._format.suffix}"))
        self.counts += counts

    def finish(self) -> None:
        """Join the parts into the file, and delete them."""
        joined = self._folder / f"whole{self._format.suffix}"
        with disk_errors(self.path):
            self._format.join([part.path for part in self._parts], joined)
            with open(joined, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(joined, self.path)
            sync_folder(self.path.parent)
            shutil.rmtree(self._folder, ignore_errors=True)


def partial_folder(path: Path) -> Path:
    """Where the parts of a file lie until it is whole."""
    return path.with_name(f"{path.name}.partial")


def check_target(path: Path, source: Path, *, overwrite: bool, resume: bool) -> None:
    """Raises ConfigError for a target that is the source or of no known format, StorageError where its folder is
    missing, ExistsError where something is there that neither `overwrite` nor `resume` allows to touch."""
    check_ending(path)
    if path.exists() and source.exists() and path.samefile(source):
        raise ConfigError(f"--out {path} is the file that is read; choose another")
    if not path.parent.is_dir():
        raise StorageError(f"there is no folder {path.parent} for {path.name}; make it, or choose another")
    if path.is_dir():
        raise ExistsError(f"{path} is a folder; choose a file")
    is_begun = (partial_folder(path) / _JOB).is_file()
    if overwrite or (resume and is_begun):
        return
    if resume and path.exists():
        raise ExistsError(f"{path} is whole, and nothing is left to resume; --overwrite answers all rows again")
    if is_begun:
        raise ExistsError(
            f"{partial_folder(path)} has the answers of a job that did not end; --resume goes on with it, --overwrite "
            "begins again"
        )
    if path.exists():
        raise ExistsError(f"{path} exists; --overwrite replaces it")


def free_names(columns: Sequence[AddedColumn], taken: Sequence[str]) -> tuple[AddedColumn, ...]:
    """The columns, `predicted_` in front of the names that the rows have already."""
    found: list[AddedColumn] = []
    for column in columns:
        name = column.name
        while name in taken:
            name = f"{_FIRST_PREFIX}{name}"
        found.append(column._replace(name=name))
    return tuple(found)


def _read_object(path: Path) -> dict[str, Any]:
    with contextlib.suppress(ValueError, RecursionError, FileNotFoundError):
        found = json.loads(path.read_bytes())
        if isinstance(found, dict):
            return found
    raise StorageError(f"{path} is broken; --overwrite without --resume begins again")


def _read_counts(path: Path) -> dict[str, Any]:
    record = _read_object(path)
    return {**record, "labels": Counter(record["labels"])}


def _whole_parts(folder: Path) -> list[_Part]:
    """The parts from the first row on, up to a gap."""
    parts: list[_Part] = []
    for path in sorted(folder.iterdir()):
        match = _PART.fullmatch(path.name)
        if match is not None and path.suffix != _COUNTS and int(match[1]) == (parts[-1].end if parts else 0):
            parts.append(_Part(int(match[1]), int(match[2]), path))
    return parts

"""Splits rows into training, validation (selects the checkpoint) and test (read by `compare` only).

Held-out rows are never in training, by index or by text: a row whose text is also among the training rows is not held
out. Test rows are not validation rows either. No row of validation is the only one of its label.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from softprompt.base import Base
from softprompt.config import DataConfig, TaskChoice, TrainConfig
from softprompt.data.read import read_all_rows, row_order
from softprompt.data.rows import Rows, render_row, rows_hash, with_labels
from softprompt.data.tasks import with_task
from softprompt.errors import ConfigError, DataError
from softprompt.types import NO_VALIDATION, InputForm, brief_repr

DEFAULT_TEST_ROWS = 200
LEAST_VALIDATION_ROWS = 20  # kept where `validation` is left out and the rows can be judged
LEAST_SPLIT_ROWS = 2 * LEAST_VALIDATION_ROWS  # so that training keeps at least half of them
_DEFAULT_VALIDATION_SHARE = 0.1


@dataclass(frozen=True, kw_only=True)
class Split:
    """The rows of one run. Validation and test carry the training rows' form, labels included."""

    __repr__ = brief_repr

    train: Rows
    validation: Rows | None  # selects the checkpoint
    test: Rows | None  # read by compare only
    validation_setting: str | None = None  # of DataConfig, that keeps the same rows again: "20", say, or "none"


def with_split_task(split: Split, base: Base, config: TrainConfig) -> Split:
    """The split with all its rows in the form of their task on this base. Raises as `with_task`."""
    train = with_task(split.train, base, config)
    if train is split.train:
        return split

    def alike(part: Rows | None) -> Rows | None:
        if part is None:
            return None
        return replace(part, form=train.form, notes=tuple(note for note in part.notes if note in train.notes))

    return replace(split, train=train, validation=alike(split.validation), test=alike(split.test))


class _SplitRequest(NamedTuple):
    """The value of `--validation` or `--test`: one of the three."""

    num_rows: int | None = None
    share: float | None = None  # of the rows, between 0 and 1
    file: str | None = None


def split_rows(
    config: DataConfig, *, seed: int = 0, offline: bool = False, form: InputForm | None = None, scored: bool = False,
    task: TaskChoice = "auto",
) -> Split:  # fmt: skip
    """Read the data once and split it; the same settings and seed give the same rows.

    `rows` selects the first N for training (after `shuffle`). `validation` and, where training would use every row,
    `test` are drawn from those rows by seed; otherwise the test rows are those after them, in order. `form` and `task`
    are as in `read_rows`. Without `validation`, a tenth of the rows but at least 20 are drawn for it, of 40 or more
    that have labels or are `scored`, that is, have a task score to choose the checkpoint by; a note of the training
    rows says so.
    Raises DataError as that does and where a split would be empty; ConfigError for a value that is not valid.
    """
    check_validation(config)
    test = _split_request("test", config.test)
    splitter = _Splitter(read_all_rows(config, offline=offline, form=form, task=task), config, seed)
    if test is not None and test.file is None:
        splitter.hold_out_test(test)
    form = with_labels(splitter.rows.select(splitter.train)).form
    setting, notes = _default(splitter, form, scored) if config.validation is None else (config.validation, ())
    validation = _split_request("validation", setting)
    if validation is not None and validation.file is None:
        splitter.hold_out_validation(validation, form.labels)
        notes = _kept_note(splitter, form) if config.validation is None else ()
    train = replace(splitter.rows.select(splitter.train), form=form, notes=(*splitter.rows.notes, *notes))
    parts = {
        "validation": _read_part(config, validation, train, offline) or splitter.part(splitter.validation),
        "test": _read_part(config, test, train, offline) or splitter.part(splitter.test),
    }
    if test is None:
        parts["test"] = splitter.part(splitter.behind(DEFAULT_TEST_ROWS))
    return replace(_without_shared_text(train, parts), validation_setting=setting)


def _default(splitter: _Splitter, form: InputForm, scored: bool) -> tuple[str, tuple[str, ...]]:
    """The `validation` of settings that leave it out, and a note on it where rows have something to be judged by."""
    if not form.labels and not scored:
        return NO_VALIDATION, ()
    total = len(splitter.train)
    if total < LEAST_SPLIT_ROWS:
        why = f"{total} are too few; from {LEAST_SPLIT_ROWS} rows on, {LEAST_VALIDATION_ROWS} are"
        return NO_VALIDATION, (f"no rows are kept for validation: {why}",)
    count = max(LEAST_VALIDATION_ROWS, round(_DEFAULT_VALIDATION_SHARE * total))
    if len(own := splitter.rows_of_own_text()) < count:
        return NO_VALIDATION, (f"no rows are kept for validation: of {total:,}, {len(own):,} have text of their own",)
    return str(count), ()


def _kept_note(splitter: _Splitter, form: InputForm) -> tuple[str, ...]:
    kept, total = len(splitter.validation), len(splitter.validation) + len(splitter.train)
    reason = "labels" if form.labels else "a task score"
    return (
        f"{kept:,} of {total:,} rows are kept for validation ({reason}); --validation {NO_VALIDATION} trains on all",
    )


def check_validation(config: DataConfig) -> None:
    """Raises ConfigError for a `validation` that is no share, number of rows, file or "none"; reads nothing."""
    _split_request("validation", config.validation)


def held_out_record(rows: Rows) -> dict[str, Any]:  # Any: JSON for the run's record
    """The record of a run's test rows: source, zero-based indices, sha256 of their text."""
    return {"source": rows.source, "indices": list(rows.indices), "hash": rows_hash(rows)}


class _Splitter:
    """Assigns the positions of one source to the three splits."""

    def __init__(self, rows: Rows, config: DataConfig, seed: int) -> None:
        order = row_order(len(rows), config, seed)
        num_rows = len(order) if config.rows is None else config.rows
        self.rows = rows
        self.seed = seed
        self.uses_all = config.rows is None
        self.train, self.rest = order[:num_rows], order[num_rows:]
        self.validation: list[int] = []
        self.test: list[int] = []
        self._keys: dict[int, str | None] = {}

    def hold_out_test(self, part: _SplitRequest) -> None:
        wanted = _num_rows(part, len(self.rows), "test")
        if self.uses_all:
            self.test = self._draw("test", wanted)
            return
        self.test = self.behind(wanted)
        if len(self.test) < wanted:
            raise DataError(
                f"test asks for {wanted:,} rows, but behind the {len(self.train):,} training rows of "
                f"{self.rows.source} there are {len(self.test):,} with text of their own; ask for fewer"
            )

    def hold_out_validation(self, part: _SplitRequest, labels: Sequence[str]) -> None:
        """A row of each label that would have none left in training stays there, unless that is all rows drawn."""
        before = self.train
        drawn = self._draw("validation", _num_rows(part, len(before), "validation"))
        left = {label for position in self.train for label in self._labels_of(position)} if labels else set()
        of_lost = {label: position for position in drawn for label in self._labels_of(position)} if labels else {}
        needed = {position for label, position in of_lost.items() if label not in left}
        self.validation = [position for position in drawn if position not in needed] or drawn
        self.train = [position for position in before if position not in set(self.validation)]

    def _labels_of(self, position: int) -> tuple[str, ...]:
        """The row's label, or its words' tags."""
        row = render_row(self.rows, position)
        return row.answers if self.rows.form.task == "tag" else (row.text,)

    def behind(self, count: int) -> list[int]:
        """The first rows after the training rows, without empty ones and without text that another split has."""
        if not self.rest:
            return []
        seen = {None, *(self._key(position) for position in (*self.train, *self.validation))}
        own = (position for position in self.rest if self._key(position) not in seen)
        return list(itertools.islice(own, count))

    def part(self, positions: Sequence[int]) -> Rows | None:
        return self.rows.select(positions) if positions else None

    def rows_of_own_text(self) -> list[int]:
        """The training rows whose text occurs once."""
        keys = [self._key(position) for position in self.train]
        counts: dict[str | None, int] = {None: 2}
        for key in keys:
            counts[key] = counts.get(key, 0) + 1
        return [position for position, key in zip(self.train, keys, strict=True) if counts[key] == 1]

    def _draw(self, name: str, count: int) -> list[int]:
        """Move rows out of training, drawn by seed from those whose text occurs once, so that no copy stays in it."""
        candidates = self.rows_of_own_text()
        if count > len(candidates) or count >= len(self.train):
            raise DataError(
                f"{name} asks for {count:,} of {len(self.train):,} rows of {self.rows.source}, of which "
                f"{len(candidates):,} have text of their own; ask for fewer, so that training keeps some"
            )
        drawn = set(random.Random(f"{name}:{self.seed}").sample(candidates, count))
        chosen = [position for position in self.train if position in drawn]
        self.train = [position for position in self.train if position not in drawn]
        return chosen

    def _key(self, position: int) -> str | None:
        """The row's text, None if there is none."""
        if position not in self._keys:
            written = render_row(self.rows, position)
            self._keys[position] = None if written.is_empty else written.key
        return self._keys[position]


def _split_request(name: str, value: str | None) -> _SplitRequest | None:
    if value is None or (name == "validation" and value == NO_VALIDATION):
        return None
    if re.fullmatch(r"\d+", value):
        return _SplitRequest(num_rows=int(value)) if int(value) else _refuse_request(name, value)
    try:
        share = float(value)
    except ValueError:
        return _SplitRequest(file=value)
    return _SplitRequest(share=share) if 0 < share < 1 else _refuse_request(name, value)


def _refuse_request(name: str, value: str) -> _SplitRequest:
    other = f", or {NO_VALIDATION}" if name == "validation" else ""
    raise ConfigError(
        f"{name} is {value!r}; it must be a share between 0 and 1, a number of rows from 1 up, or a file{other}"
    )


def _num_rows(part: _SplitRequest, available: int, name: str) -> int:
    if part.num_rows is not None:
        return part.num_rows
    assert part.share is not None, name
    return max(1, round(part.share * available))


def _read_part(config: DataConfig, part: _SplitRequest | None, train: Rows, offline: bool) -> Rows | None:
    """A split in a file of its own, read from the same columns as the training rows."""
    if part is None or part.file is None:
        return None
    kind, column = train.form.kind, train.column
    settings = replace(
        config, data=part.file, subset=None, label_column=None, template=None, completion=None,
        text_column=column if kind == "plain" else None, messages_column=column if kind == "chat" else None,
    )  # fmt: skip
    return read_all_rows(settings, offline=offline, form=train.form)


def _without_shared_text(train: Rows, parts: dict[str, Rows | None]) -> Split:
    seen = _keys(train) if any(part is not None for part in parts.values()) else set()
    kept: dict[str, Rows | None] = {}
    for name in ("validation", "test"):
        part = parts[name]
        kept[name] = None if part is None else _leaving_out(part, seen, train, name)
        seen |= _keys(kept[name])
    return Split(train=train, validation=kept["validation"], test=kept["test"])


def _leaving_out(part: Rows, seen: Iterable[str], train: Rows, name: str) -> Rows:
    own = [i for i in range(len(part)) if render_row(part, i).key not in seen]
    if not own:
        raise DataError(f"{name} {part.source}: the text of every row is in training too; give rows of their own")
    return replace(part.select(own), form=train.form)


def _keys(rows: Rows | None) -> set[str]:
    return set() if rows is None else {render_row(rows, position).key for position in range(len(rows))}

"""The rows of jobs and of their events in the database, and what a running job writes there.

A status changes by compare-and-set: of two changes at once, one is refused. A fast run takes a thousand steps a second.
All of them stand in the run's `metrics.jsonl`; its events are a few each second, written in one transaction.
"""

from __future__ import annotations

import csv
import hashlib
import io
import math
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from softprompt.server.jobs.files import Files
from softprompt.server.jobs.schemas import Json
from softprompt.server.state.database import Database, page_of
from softprompt.server.state.schema import FileRow, JobEventRow, JobRow, KeyRow
from softprompt.storage.atomic import write_file
from softprompt.training import Checkpoint, StepDone

TAKEN = ("validating_files", "running")  # by the thread that trains
ACTIVE = ("queued", *TAKEN)  # what a client's limit counts
OPEN = (*ACTIVE, "paused")
_MAX_CRASHES = 10  # of the server without a step in between, when memory runs out, for example
_CHUNK = 200  # rows that a search by metadata reads at once
_WRITE_EVERY_S = 0.5
_METRICS_EVERY_S = 0.1
_MAX_METRICS_EVENTS = 1_000  # of a job, validations apart
RESULTS_PURPOSE = "fine-tune-results"
_RESULT_COLUMNS = ("step", "epoch", "train_loss", "valid_loss", "learning_rate")


class NewEvent(NamedTuple):
    """A job's event that is not written yet."""

    message: str
    data: Json = {}  # never changed  # noqa: RUF012
    level: str = "info"
    kind: str = "message"

    def row(self, job: str, created: float) -> JobEventRow:
        return JobEventRow(
            id=f"ftevent-{uuid.uuid4().hex[:24]}", job=job, created=created, level=self.level, kind=self.kind,
            message=self.message, data=self.data,
        )  # fmt: skip


_PAUSED_AFTER_CRASHES = NewEvent(
    f"the server has ended {_MAX_CRASHES} times in a row while this job ran, so it is paused; resume it, or ask for "
    "fewer rows per step or shorter ones",
    level="warn",
)
_REVOKED = NewEvent("the job is cancelled: the API key that asked for it is revoked")


class JobRecords:
    """The rows of jobs and of their events."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, row: JobRow, event: NewEvent) -> None:
        with self._database.session() as session:
            session.add(row)
            session.flush()
            session.add(event.row(row.id, row.created))

    def add_file(self, row: FileRow) -> None:
        with self._database.session() as session:
            session.add(row)

    def get(self, job: str) -> JobRow | None:
        with self._database.session() as session:
            return session.get(JobRow, job)

    def count(self, owner: str, statuses: Collection[str]) -> int:
        query = select(func.count()).where(JobRow.owner == owner, JobRow.status.in_(statuses))
        with self._database.session() as session:
            return session.scalar(query) or 0

    def move(
        self, job: str, before: Collection[str], status: str, events: Iterable[NewEvent] = (), **values: Any
    ) -> bool:  # Any: the row's other columns
        """Change the status and write the events if the status is one of `before`; returns whether it was."""
        with self._database.session() as session:
            change = update(JobRow).where(JobRow.id == job, JobRow.status.in_(before)).values(status=status, **values)
            has_moved = bool(session.execute(change).rowcount)  # type: ignore[attr-defined]  # a CursorResult's
            if has_moved:
                _add_events(session, job, events)
        return has_moved

    def write_progress(self, job: str, events: Sequence[NewEvent], outcome: Json) -> None:
        """Write a running job's events and outcome in one transaction."""
        with self._database.session() as session:
            session.execute(update(JobRow).where(JobRow.id == job).values(outcome=outcome))
            _add_events(session, job, events)

    def page(
        self, owner: str, after: JobRow | None, limit: int, is_wanted: Callable[[JobRow], bool] | None
    ) -> tuple[list[JobRow], bool]:
        """A client's jobs, the latest first, and whether there are more."""
        query, found, has_more = select(JobRow).where(JobRow.owner == owner), list[JobRow](), True
        with self._database.session() as session:
            while len(found) <= limit and has_more:
                size = limit + 1 if is_wanted is None else _CHUNK
                some, has_more = page_of(session, query, (JobRow.created, JobRow.id), after, size)
                found += [row for row in some if is_wanted is None or is_wanted(row)]
                after = some[-1] if some else after
        return found[:limit], len(found) > limit

    def event(self, event: str) -> JobEventRow | None:
        with self._database.session() as session:
            return session.scalar(select(JobEventRow).where(JobEventRow.id == event))

    def events(self, job: str, after: JobEventRow | None, limit: int) -> tuple[list[JobEventRow], bool]:
        """A job's events, the latest first, and whether there are more."""
        query = select(JobEventRow).where(JobEventRow.job == job)
        with self._database.session() as session:
            return page_of(session, query, (JobEventRow.number,), after, limit)

    def recover(self) -> None:
        """For a start: the jobs that a killed process had taken are queued again, before all others."""
        with self._database.session() as session:
            for row in session.scalars(select(JobRow).where(JobRow.status.in_(TAKEN))):
                crashes = _crashes(row)
                is_hopeless = crashes["count"] >= _MAX_CRASHES
                row.status = "paused" if is_hopeless else "queued"
                row.outcome = {**row.outcome, "is_interrupted": True, "crashes": crashes}
                if is_hopeless:
                    _add_events(session, row.id, [_PAUSED_AFTER_CRASHES])

    def cancel_revoked(self) -> list[str]:
        """Cancel the jobs of revoked keys, which no client can see any more; returns their ids."""
        query = select(JobRow).join(KeyRow, KeyRow.id == JobRow.owner)
        query = query.where(KeyRow.revoked.is_not(None), JobRow.status.in_(OPEN)).with_for_update(of=JobRow)
        with self._database.session() as session:
            found = list(session.scalars(query))
            for row in found:
                row.status, row.finished = "cancelled", time.time()
                _add_events(session, row.id, [_REVOKED])
            return [row.id for row in found]

    def next(self) -> JobRow | None:
        """The job to train next: an interrupted one, else the oldest of the client whose last turn is longest ago."""
        with self._database.session() as session:
            waiting = list(session.scalars(select(JobRow).where(JobRow.status == "queued")))
            turns = select(JobRow.owner, func.max(JobRow.started)).group_by(JobRow.owner)
            last = {owner: started or 0.0 for owner, started in session.execute(turns)}
        return min(waiting, key=lambda row: _rank(row, last.get(row.owner, 0.0)), default=None)


def _crashes(row: JobRow) -> Json:
    """How often in a row the server has ended while the job was at this step."""
    before, step = row.outcome.get("crashes", {}), row.outcome.get("steps", 0)
    return {"step": step, "count": before["count"] + 1 if before.get("step") == step else 1}


def _rank(row: JobRow, last_turn: float) -> tuple[bool, float, float, str]:
    return not row.outcome.get("is_interrupted"), last_turn, row.created, row.id


def _add_events(session: Session, job: str, events: Iterable[NewEvent]) -> None:
    now = time.time()
    session.add_all([event.row(job, now) for event in events])


class JobEventLog:
    """The events of one running job, gathered and written at intervals; `outcome` becomes the row's column."""

    def __init__(self, records: JobRecords, row: JobRow, clock: Callable[[], float] = time.time) -> None:
        self.outcome: Json = dict(row.outcome)
        self._records, self._job, self._clock = records, row.id, clock
        self._events: list[NewEvent] = []
        self._written = self._measured = -math.inf
        self._total_steps = self._first_step = 0
        self._measured_step = 0
        self._began = 0.0
        self._last_loss: float | None = None

    def start(self, step: int, total_steps: int, trained_tokens: int) -> None:
        """Training begins, or is resumed, after `step`."""
        self._first_step, self._total_steps, self._began = step, total_steps, self._clock()
        self._measured_step = step
        self.outcome |= {"trained_tokens": trained_tokens, "steps": step, "total_steps": total_steps}

    def add(self, message: str, level: str = "info") -> None:
        self._events.append(NewEvent(message, level=level))

    def add_step(self, event: StepDone) -> None:
        """Note a step; it becomes an event unless there was one just before."""
        self._last_loss = finite(event.loss)
        now = self._clock()
        per_step = (now - self._began) / (event.step - self._first_step)
        self.outcome |= {
            "steps": event.step,
            "trained_tokens": self.outcome["trained_tokens"] + event.num_tokens,
            "estimated_finish": now + per_step * (self._total_steps - event.step),
        }
        is_due = (event.step - self._measured_step) * _MAX_METRICS_EVENTS >= self._total_steps
        if (is_due and now - self._measured >= _METRICS_EVERY_S) or event.step == self._total_steps:
            self._measured, self._measured_step = now, event.step
            self._add_metrics(event.step, {"learning_rate": event.learning_rate, "epoch": event.epoch})

    def add_checkpoint(self, event: Checkpoint) -> Json:
        """Note a checkpoint; returns its metrics under OpenAI's names."""
        valid = finite(event.validation_loss)
        metrics = {"step": event.step, "train_loss": self._last_loss, "valid_loss": valid, "full_valid_loss": valid}
        if valid is not None:
            scored = {} if event.score is None else {"score": finite(event.score)}
            self._add_metrics(event.step, {"valid_loss": valid, "full_valid_loss": valid, **scored})
        return metrics

    def _add_metrics(self, step: int, more: Json) -> None:
        data = {"step": step, "total_steps": self._total_steps, "train_loss": self._last_loss, **more}
        words = [f"step {step:,} of {self._total_steps:,}"]
        words += [
            f"{label} loss {data[name]:.4f}"
            for name, label in (("train_loss", "training"), ("valid_loss", "validation"))
            if data.get(name) is not None
        ]
        self._events.append(NewEvent(", ".join(words), data, kind="metrics"))

    def write(self, *, now: bool = True) -> None:
        """Write to the database; without `now` only if the last time was a while ago."""
        if now or self._clock() - self._written >= _WRITE_EVERY_S:
            events, self._events = self._events, []
            self._records.write_progress(self._job, events, self.outcome)
            self._written = self._clock()

    def pop_unwritten(self) -> list[NewEvent]:
        """The events that are not written yet, for the caller's own transaction."""
        events, self._events = self._events, []
        return events


def finite(number: float | None) -> float | None:
    """The number, or None for NaN and infinity, which JSON does not have."""
    return number if number is not None and math.isfinite(number) else None


def add_results(files: Files, records: JobRecords, owner: str, lines: Iterable[Json]) -> str:
    """Write a job's metrics as a CSV file of the owner's, as OpenAI does, and return its id. Raises StorageError."""
    file, data = files.new_id(), _csv(lines)
    write_file(files.folder / f"{file}.jsonl", data)  # in the folder of all files
    records.add_file(
        FileRow(
            id=file, owner=owner, filename="step_metrics.csv", purpose=RESULTS_PURPOSE, num_bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(), created=time.time(),
        )
    )  # fmt: skip
    return file


def _csv(lines: Iterable[Json]) -> bytes:
    steps: dict[int, dict[str, Any]] = {}  # Any: cells of a table
    for line in lines:
        step = steps.setdefault(line["step"], {"step": line["step"]})
        if line["kind"] == "step":
            step |= {"epoch": line["epoch"], "train_loss": line["loss"], "learning_rate": line["learning_rate"]}
        if line["kind"] == "checkpoint":
            step["valid_loss"] = line["validation_loss"]
    text = io.StringIO()
    table = csv.DictWriter(text, _RESULT_COLUMNS, lineterminator="\n")
    table.writeheader()
    table.writerows(steps.values())
    return text.getvalue().encode()

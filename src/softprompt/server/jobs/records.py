"""What the database knows of jobs. A status changes by compare-and-set: of two at once, one is told no."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, and_, func, or_, select, update
from sqlalchemy.orm import Session

from softprompt.server.jobs.schemas import Json
from softprompt.server.state.database import Database
from softprompt.server.state.schema import FileRow, JobEventRow, JobRow, KeyRow

TAKEN = ("validating_files", "running")  # by the thread that trains
ACTIVE = ("queued", *TAKEN)  # what a client's limit counts
OPEN = (*ACTIVE, "paused")
_MAX_CRASHES = 10  # of the server without a step in between, memory that the kernel refused say
_CHUNK = 200  # rows that a search by metadata reads at once


class NewEvent(NamedTuple):
    """A line of a job's story, not yet written."""

    message: str
    data: Json = {}  # never changed  # noqa: RUF012
    level: str = "info"
    kind: str = "message"

    def row(self, job: str, created: float) -> JobEventRow:
        return JobEventRow(
            id=f"ftevent-{uuid.uuid4().hex[:24]}", job=job, created=created, level=self.level, kind=self.kind,
            message=self.message, data=self.data,
        )  # fmt: skip


_HOPELESS = NewEvent(
    f"the server has ended {_MAX_CRASHES} times in a row while this job ran, so it is paused; resume it, or ask for "
    "fewer rows per step or shorter ones",
    level="warn",
)


_REVOKED = NewEvent("the job is cancelled: the API key that asked for it is revoked", level="warn")


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

    def counts(self) -> dict[str, int]:
        """Jobs of all clients by status."""
        query = select(JobRow.status, func.count()).group_by(JobRow.status)
        with self._database.session() as session:
            return {row[0]: row[1] for row in session.execute(query)}

    def move(
        self, job: str, before: Collection[str], status: str, events: Iterable[NewEvent] = (), **values: Any
    ) -> bool:  # Any: the row's other columns
        """Change the status if it is one of `before`, and say whether that was so. Only then are events written."""
        with self._database.session() as session:
            change = update(JobRow).where(JobRow.id == job, JobRow.status.in_(before)).values(status=status, **values)
            has_moved = bool(session.execute(change).rowcount)  # type: ignore[attr-defined]  # a CursorResult's
            if has_moved:
                _add_events(session, job, events)
        return has_moved

    def tell(self, job: str, events: Sequence[NewEvent], outcome: Json) -> None:
        """Write what a running job has come to, in one transaction."""
        with self._database.session() as session:
            session.execute(update(JobRow).where(JobRow.id == job).values(outcome=outcome))
            _add_events(session, job, events)

    def page(
        self, owner: str, after: JobRow | None, limit: int, is_wanted: Callable[[JobRow], bool] | None
    ) -> tuple[list[JobRow], bool]:
        """A client's jobs, the latest first, and whether there are more."""
        found: list[JobRow] = []
        with self._database.session() as session:
            while len(found) <= limit:
                size = limit + 1 if is_wanted is None else _CHUNK
                some = list(session.scalars(_jobs_behind(owner, after).limit(size)))
                found += [row for row in some if is_wanted is None or is_wanted(row)]
                if len(some) < size:
                    break
                after = some[-1]
        return found[:limit], len(found) > limit

    def event(self, event: str) -> JobEventRow | None:
        with self._database.session() as session:
            return session.scalar(select(JobEventRow).where(JobEventRow.id == event))

    def events(self, job: str, after: JobEventRow | None, limit: int) -> tuple[list[JobEventRow], bool]:
        """A job's events, the latest first, and whether there are more."""
        query = select(JobEventRow).where(JobEventRow.job == job)
        if after is not None:
            query = query.where(JobEventRow.number < after.number)
        with self._database.session() as session:
            found = list(session.scalars(query.order_by(JobEventRow.number.desc()).limit(limit + 1)))
        return found[:limit], len(found) > limit

    def recover(self) -> None:
        """Nobody trains: what a killed process had taken waits again, in front of all others."""
        with self._database.session() as session:
            for row in session.scalars(select(JobRow).where(JobRow.status.in_(TAKEN))):
                crashes = _crashes(row)
                is_hopeless = crashes["count"] >= _MAX_CRASHES
                row.status = "paused" if is_hopeless else "queued"
                row.outcome = {**row.outcome, "is_interrupted": True, "crashes": crashes}
                if is_hopeless:
                    _add_events(session, row.id, [_HOPELESS])

    def cancel_revoked(self) -> list[str]:
        """Cancel the jobs of revoked keys, which nobody sees any more; their ids."""
        query = select(JobRow).join(KeyRow, KeyRow.id == JobRow.owner)
        query = query.where(KeyRow.revoked.is_not(None), JobRow.status.in_(OPEN)).with_for_update(of=JobRow)
        with self._database.session() as session:
            found = list(session.scalars(query))
            for row in found:
                row.status, row.finished = "cancelled", time.time()
                _add_events(
                    session, row.id, [NewEvent("the job is cancelled: the API key that asked for it is revoked")]
                )
            return [row.id for row in found]

    def next(self) -> JobRow | None:
        """Whose turn it is: an interrupted job; else the oldest of the client whose last turn is longest ago."""
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


def _jobs_behind(owner: str, after: JobRow | None) -> Any:  # Any: a select of JobRow
    query = select(JobRow).where(JobRow.owner == owner)
    if after is not None:
        query = query.where(_is_behind(after))
    return query.order_by(JobRow.created.desc(), JobRow.id.desc())


def _is_behind(row: JobRow) -> ColumnElement[bool]:
    return or_(JobRow.created < row.created, and_(JobRow.created == row.created, JobRow.id < row.id))

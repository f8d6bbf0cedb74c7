"""Uploaded files: their bytes in a folder, what is known of them in the database. Each belongs to one client.

A file is there when its row is: it is renamed to its place whole, and the row is written after. It is gone when its
place is empty: that is emptied first, and the row follows.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import anyio
from fastapi import Request
from sqlalchemy import delete, func, or_, select
from sqlalchemy.orm import Session

from softprompt.errors import StorageError, shortened
from softprompt.server.clients.keys import Client
from softprompt.server.clients.quotas import Amounts
from softprompt.server.errors import ApiError
from softprompt.server.forms import FormFile, read_form
from softprompt.server.jobs.files_rows import check_rows
from softprompt.server.state.database import Database, page_of
from softprompt.server.state.schema import FileRow, JobRow
from softprompt.storage.atomic import disk_errors, sync_folder

PURPOSE = "fine-tune"
_ID = re.compile(r"file-[0-9a-f]{32}")
_STORED = re.compile(rf"({_ID.pattern})\.jsonl")
_DELETED = re.compile(rf"\.({_ID.pattern})\.deleted")
_PARTIAL = re.compile(rf"\.{_ID.pattern}(\.jsonl\.[0-9a-f]+)?\.partial")  # an upload; a result that was being written
_LONGEST_NAME = 255  # characters of a file's name that are kept
_ENDED = ("succeeded", "failed", "cancelled")  # a job that needs its files no more
_NUM_NAMED = 5  # files that a line of the log names

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """A file that was taken whole, and whose rows were checked."""

    id: str
    owner: str
    filename: str  # as the client called it, shortened; never a path of ours
    purpose: str
    num_bytes: int
    num_rows: int
    form: str  # plain, template (prompt and completion) or chat
    created: float  # seconds since 1970
    path: Path


@dataclass(frozen=True)
class Upload:
    """A form with a file that has arrived whole."""

    fields: Mapping[str, str]
    filename: str  # as the client called it; never a path of ours
    num_bytes: int
    sha256: str


class Files:
    """The files of all clients; each sees its own. Any thread may use it."""

    def __init__(self, database: Database, folder: Path, max_bytes: int) -> None:
        """`folder` is made where it is missing. Raises StorageError where it cannot be."""
        self.folder = folder
        self.max_bytes = max_bytes
        self.changes = threading.RLock()  # hold it to look a file up and to write a row that needs it, in one
        self.checks = anyio.CapacityLimiter(1)  # uploads that are checked at once: answers need the processor more
        self._database = database
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"cannot make {folder}: {error.strerror or error}; choose another place") from error

    def get(self, file_id: str, client: Client) -> StoredFile:
        """A client's file. Raises ApiError 404 for one that is not there or is another's, in the same words."""
        with self._database.session() as session:
            return self._stored(self._row(session, file_id, client))

    def list(
        self, client: Client, *, purpose: str | None = None, after: str | None = None, limit: int, newest_first: bool
    ) -> tuple[list[StoredFile], bool]:
        """A client's files behind `after`, `limit` at most, and whether there are more. Raises ApiError 404."""
        query = select(FileRow).where(FileRow.owner == client.id)
        if purpose is not None:
            query = query.where(FileRow.purpose == purpose)
        with self._database.session() as session:
            last = None if after is None else self._row(session, after, client)
            rows, has_more = page_of(
                session, query, (FileRow.created, FileRow.id), last, limit, newest_first=newest_first
            )
        return [self._stored(row) for row in rows], has_more

    def amounts(self, owner: str) -> Amounts:
        """What is kept for a client, results of its jobs included."""
        with self._database.session() as session:
            query = select(func.count(), func.coalesce(func.sum(FileRow.num_bytes), 0)).where(FileRow.owner == owner)
            num_files, num_bytes = session.execute(query).one()
        return Amounts(files=num_files, num_bytes=int(num_bytes))

    def new_id(self) -> str:
        """An id that nobody guesses."""
        return f"file-{secrets.token_hex(16)}"

    def arriving(self, file_id: str) -> Path:
        """The path of an upload until it is whole."""
        return self.folder / f".{file_id}.partial"

    async def receive(self, file_id: str, request: Request, on_bytes: Callable[[int], None]) -> Upload:
        """Write a form's file to `arriving`, synced. Raises ApiError for a form that is not whole or has no file.

        `on_bytes` may refuse bytes as they come.
        """
        received: list[FormFile] = []
        too_large = f"the file is larger than {self.max_bytes:,} bytes, the most that is taken here"

        def open_file(name: str, filename: str) -> FormFile | None:
            if name != "file":
                return None
            if received:
                raise ApiError(400, "the form has a second field 'file'; send one file", "invalid_value", "file")
            received.append(FormFile(file, filename, self.max_bytes, too_large, on_bytes))
            return received[0]

        with disk_errors(self.folder), open(self.arriving(file_id), "xb") as file:
            fields = await read_form(request, open_file, self.max_bytes)
            await anyio.to_thread.run_sync(os.fsync, file.fileno())
        if not received:
            raise ApiError(400, "the form has no field 'file'; send a file in it", "invalid_value", "file")
        (found,) = received
        return Upload(fields, found.filename, found.num_bytes, found.sha256)

    def add(self, file_id: str, upload: Upload, client: Client) -> StoredFile:
        """Keep what has arrived: check its rows, rename it, and write its row.

        Raises DataError for rows that cannot be used, ApiError for a purpose that is not ours.
        """
        purpose = _purpose(upload.fields)
        rows = check_rows(self.arriving(file_id))
        row = FileRow(id=file_id, owner=client.id, filename=upload.filename[:_LONGEST_NAME] or "file", purpose=purpose,
                      num_bytes=upload.num_bytes, sha256=upload.sha256, num_rows=rows.num_rows, form=rows.form,
                      created=time.time())  # fmt: skip
        place = self._place(file_id)
        os.replace(self.arriving(file_id), place)
        try:
            sync_folder(self.folder)
            with self._database.session() as session:
                session.add(row)
        except BaseException:
            place.unlink(missing_ok=True)
            raise
        return self._stored(row)

    def delete(self, file_id: str, client: Client) -> None:
        """Raises ApiError 404 as `get` does, 409 while a job needs it."""
        with self.changes:
            with self._database.session() as session:
                self._row(session, file_id, client)
                job = in_use(session, file_id)
            if job is not None:
                raise ApiError(409, f"file {file_id!r} is needed by job {job!r}; cancel that, or wait for its end",
                               "file_in_use", "file_id")  # fmt: skip
            self._delete(file_id)

    def clean(self) -> None:
        """After a start: removes what ended midway, and names in the log what does not belong together."""
        names = [path.name for path in self.folder.iterdir()]
        deleted = {match[1] for name in names if (match := _DELETED.fullmatch(name))}
        stored = {match[1] for name in names if (match := _STORED.fullmatch(name))}
        with self._database.session() as session:
            session.execute(delete(FileRow).where(FileRow.id.in_(deleted)))
        for name in names:
            if _PARTIAL.fullmatch(name) or _DELETED.fullmatch(name):
                (self.folder / name).unlink(missing_ok=True)
        with self._database.session() as session:
            known = set(session.scalars(select(FileRow.id)))
        _warn("%d files are not in the database, and are left where they are: %s", stored - known)
        _warn("%d files of the database are not in the folder; jobs that need them will fail: %s", known - stored)

    def _delete(self, file_id: str) -> None:
        place, doomed = self._place(file_id), self.folder / f".{file_id}.deleted"
        if place.exists():
            os.replace(place, doomed)
        try:
            with self._database.session() as session:
                session.execute(delete(FileRow).where(FileRow.id == file_id))
        except BaseException:
            if doomed.exists():
                os.replace(doomed, place)
            raise
        doomed.unlink(missing_ok=True)

    def _row(self, session: Session, file_id: str, client: Client) -> FileRow:
        row = session.get(FileRow, file_id) if _ID.fullmatch(file_id) else None
        if row is None or row.owner != client.id:
            raise ApiError(404, f"there is no file {shortened(file_id, 100)}", "file_not_found", "file_id")
        return row

    def _place(self, file_id: str) -> Path:
        return self.folder / f"{file_id}.jsonl"

    def _stored(self, row: FileRow) -> StoredFile:
        return StoredFile(id=row.id, owner=row.owner, filename=row.filename, purpose=row.purpose,
                          num_bytes=row.num_bytes, num_rows=row.num_rows or 0, form=row.form or "",
                          created=row.created, path=self._place(row.id))  # fmt: skip


def in_use(session: Session, file_id: str) -> str | None:
    """A job that waits, runs or is paused and needs that file."""
    needs = or_(JobRow.training_file == file_id, JobRow.validation_file == file_id)
    return session.scalar(select(JobRow.id).where(needs, JobRow.status.not_in(_ENDED)).limit(1))


def _purpose(fields: Mapping[str, str]) -> str:
    foreign = next((name for name in fields if name.startswith("expires_after")), None)
    if foreign is not None:
        raise ApiError(400, f"{foreign}: files are kept until they are deleted; leave it out", None, "expires_after")
    purpose = fields.get("purpose")
    if purpose != PURPOSE:
        given = "is not given" if purpose is None else f"is {shortened(purpose)}"
        raise ApiError(400, f"purpose {given}; it must be {PURPOSE!r}", "invalid_value", "purpose")
    return purpose


def _warn(message: str, ids: set[str]) -> None:
    if ids:
        _log.warning(message, len(ids), ", ".join(sorted(ids)[:_NUM_NAMED]))

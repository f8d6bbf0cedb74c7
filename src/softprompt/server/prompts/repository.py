"""The prompts that outlive the process: each in an adapter folder of its own, with a row that says what it is.

A prompt is there when its row is. A folder without a row was left by a killed process and is never read. Rows without
a folder carry the flags of the library's prompts.
"""

from __future__ import annotations

import logging
import uuid
from pathlib import Path
from typing import NamedTuple

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from softprompt.base import Base
from softprompt.errors import SoftpromptError, StorageError
from softprompt.server.clients.keys import OPERATOR
from softprompt.server.prompts.adapter_import import read_folder
from softprompt.server.prompts.model import LIBRARY, Alias, Model, Target
from softprompt.server.state.database import Database
from softprompt.server.state.schema import AliasRow, PromptRow
from softprompt.storage import save_prompt
from softprompt.storage.atomic import remove_folder

_UNLOADED = "unloaded"  # the source of a row that keeps a library's prompt from being served
_log = logging.getLogger(__name__)


class LibraryFlags(NamedTuple):
    """What an admin has set for a library's prompt."""

    is_pinned: bool
    is_unloaded: bool


class Kept(NamedTuple):
    """Everything that outlived the process before."""

    models: list[Model]
    aliases: list[Alias]
    flags: dict[str, LibraryFlags]  # of the library's prompts, by name
    problems: dict[str, str]  # of prompts that cannot be served, by name


class PromptRepository:
    """Prompts in `STATE/prompts/ID/` and their rows. Blocks on the disk; safe in any thread."""

    def __init__(self, state: Path, database: Database, base: Base) -> None:
        self._state = state
        self._database = database
        self._base = base

    def load(self) -> Kept:
        """Read everything; a prompt that is broken is set aside and named in `problems`."""
        self._sweep()
        kept = Kept([], [], {}, {})
        with self._database.session() as session:
            rows = list(session.scalars(select(PromptRow).order_by(PromptRow.created, PromptRow.name)))
            kept.aliases.extend(map(_alias_of, session.scalars(select(AliasRow))))
        for row in rows:
            if row.folder is None:
                kept.flags[row.name] = LibraryFlags(row.is_pinned, row.source == _UNLOADED)
                continue
            try:
                kept.models.append(self._model_of(row, row.folder))
            except SoftpromptError as error:
                _log.warning("the prompt %r is set aside: %s", row.name, error)
                kept.problems[row.name] = str(error)
        return kept

    def write(self, model: Model) -> str:
        """Write a prompt into a new folder, which counts only once it is added. Gives its path below the state."""
        assert model.prompt is not None
        folder = f"prompts/prompt-{uuid.uuid4().hex}"
        save_prompt(model.prompt, self._state / folder)
        return folder

    def add(self, model: Model, folder: str) -> str | None:
        """Make the folder the prompt of that owner and name; gives the folder that was it before."""
        with self._database.session() as session:
            replaced = _take_row(session, model.owner, model.id)
            session.add(_row_of(model, folder))
        return replaced

    def update(self, model: Model, name: str) -> None:
        """Write what has changed of a kept prompt that was called `name`."""
        with self._database.session() as session:
            row = _find_row(session, model.owner, name)
            if row is not None:
                row.name, row.is_pinned, row.is_shared = model.id, model.is_pinned, model.is_shared

    def remove(self, name: str, owner: str) -> str | None:
        """Delete a prompt's row; gives its folder, which is still to be discarded."""
        with self._database.session() as session:
            return _take_row(session, owner, name)

    def discard(self, folder: str | None) -> None:
        """Delete a folder that no row names. If that fails it stays, and is never read."""
        if folder is None:
            return
        try:
            remove_folder(self._state / folder)
        except StorageError as error:
            _log.warning("a folder of no use could not be deleted: %s", error)

    def set_flags(self, name: str, flags: LibraryFlags) -> None:
        """Keep the flags of a library's prompt."""
        with self._database.session() as session:
            _take_row(session, OPERATOR, name)
            if flags.is_pinned or flags.is_unloaded:
                source = _UNLOADED if flags.is_unloaded else LIBRARY
                session.add(_row_of(Model(id=name, source=source, is_pinned=flags.is_pinned), None))

    def put_alias(self, alias: Alias) -> None:
        with self._database.session() as session:
            session.merge(_alias_row_of(alias))

    def remove_alias(self, name: str, owner: str) -> None:
        with self._database.session() as session:
            session.execute(delete(AliasRow).where(AliasRow.owner == owner, AliasRow.name == name))

    def _model_of(self, row: PromptRow, folder: str) -> Model:
        path = (self._state / folder).resolve()
        if not path.is_relative_to(self._state.resolve()):
            raise StorageError(f"the prompt's folder {folder!r} leads out of {self._state}")
        return Model(
            id=row.name,
            prompt=read_folder(path, self._base),
            owner=row.owner,
            source=row.source,
            job=row.job,
            is_shared=row.is_shared,
            is_pinned=row.is_pinned,
            created=row.created,
        )

    def _sweep(self) -> None:
        """Delete the temporary folders that a killed process left."""
        for left in (self._state / "prompts").glob(".*"):
            if left.is_dir():
                self.discard(str(left.relative_to(self._state)))


def _find_row(session: Session, owner: str, name: str) -> PromptRow | None:
    return session.scalar(select(PromptRow).where(PromptRow.owner == owner, PromptRow.name == name))


def _take_row(session: Session, owner: str, name: str) -> str | None:
    """Delete a row if it is there; gives the folder that it named."""
    row = _find_row(session, owner, name)
    if row is None:
        return None
    folder = row.folder
    session.delete(row)
    session.flush()
    return folder


def _row_of(model: Model, folder: str | None) -> PromptRow:
    return PromptRow(
        id=f"prompt-{uuid.uuid4().hex}" if folder is None else folder.rpartition("/")[2],
        owner=model.owner,
        name=model.id,
        folder=folder,
        source=model.source,
        job=model.job,
        is_shared=model.is_shared,
        is_pinned=model.is_pinned,
        created=model.created,
    )


def _alias_row_of(alias: Alias) -> AliasRow:
    targets = {"targets": [{"model": each.model, "share": each.share} for each in alias.targets]}
    return AliasRow(
        owner=alias.owner, name=alias.name, targets=targets, is_shared=alias.is_shared, created=alias.created
    )


def _alias_of(row: AliasRow) -> Alias:
    targets = tuple(Target(each["model"], each["share"]) for each in row.targets["targets"])
    return Alias(name=row.name, targets=targets, owner=row.owner, is_shared=row.is_shared, created=row.created)
